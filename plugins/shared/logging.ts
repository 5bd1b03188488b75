import process from "node:process";
import { configureSync, getAnsiColorFormatter, jsonLinesFormatter, type LogLevel } from "@logtape/logtape";

/** Logs of Dormouse to stderr: for a person on a terminal, as JSON lines elsewhere, or as `format` says. */
export function configureLogging(options: { level: LogLevel; format: "auto" | "human" | "json" }): void {
  const human = options.format === "human" || (options.format === "auto" && process.stderr.isTTY === true);
  const formatter = human ? getAnsiColorFormatter({ timestamp: "time" }) : jsonLinesFormatter;
  const write = (record: Parameters<typeof formatter>[0]) => void process.stderr.write(formatter(record));
  configureSync({
    reset: true,
    sinks: { stderr: write },
    loggers: [
      { category: "dormouse", lowestLevel: options.level, sinks: ["stderr"] },
      { category: ["logtape", "meta"], lowestLevel: "warning", sinks: ["stderr"] },
    ],
  });
}
