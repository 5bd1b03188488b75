import type { StandbyDecision } from "../../main.ts";
import type { Entry } from "./entry.ts";

export type Decide = (
  entry: Entry,
  decision: StandbyDecision["decision"],
  reason: string,
  detail?: Record<string, unknown>,
) => void;
