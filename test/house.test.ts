import assert from "node:assert/strict";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join, relative, resolve } from "node:path";
import { it } from "node:test";
import { ERRORS } from "../plugins/shared/errors.ts";
import { ROOT } from "./helpers.ts";

/** As .gitignore has it, and git's own. */
const IGNORED = new Set(["node_modules", "data", "coverage", ".git"]);

/** Every file of the project below a folder, as paths from its root. */
function filesOf(folder: string): string[] {
  return readdirSync(join(ROOT, folder), { withFileTypes: true }).flatMap((entry) => {
    const path = join(folder, entry.name);
    if (entry.isDirectory()) return IGNORED.has(entry.name) ? [] : filesOf(path);
    return entry.isFile() && !entry.name.endsWith(".log") ? [path] : [];
  });
}

const read = (path: string) => readFileSync(join(ROOT, path), "utf8");
const codeOf = (folder: string) => filesOf(folder).filter((path) => path.endsWith(".ts"));
const lines = (text: string) => text.trimEnd().split("\n").length;
/** The same text with as many lines, without comments and without what stands in quotes. */
const bare = (text: string) =>
  text.replace(/\/\*[^]*?\*\//g, (comment) => comment.replace(/[^\n]/g, "")).replace(/"(?:\\.|[^"\\\n])*"/g, '""')
    .replace(/(^|\s)\/\/.*/g, "");

function importsOf(path: string): string[] {
  const found = read(path).matchAll(/^(?:import|export)\b(?:[^;"]*?\bfrom)?\s*"([^"]+)"|\bimport\("([^"]+)"\)/gm);
  return [...found].map(([, declared, dynamic]) => declared ?? dynamic);
}

it("plugins import main.ts, their own folder, plugins/shared and packages, and nothing else", () => {
  const wrong: string[] = [];
  for (const path of [...codeOf("plugins"), "main.ts"]) {
    const [, owner] = path.split("/");
    for (const specifier of importsOf(path).filter((each) => /^[./]|^file:/.test(each))) {
      const target = relative(ROOT, resolve(ROOT, dirname(path), specifier));
      const allowed = target.startsWith("plugins/shared/") || (path !== "main.ts" && target === "main.ts") ||
        (owner !== undefined && !owner.endsWith(".ts") && target.startsWith(`plugins/${owner}/`));
      if (!allowed || !specifier.endsWith(".ts")) wrong.push(`${path} imports ${specifier}`);
    }
  }
  assert.deepEqual(wrong, []);
});

it("main.ts has at most 700 lines and each file of a plugin at most 300", () => {
  const long = ["main.ts", ...codeOf("plugins")]
    .map((path) => [path, lines(read(path))] as const)
    .filter(([path, count]) => count > (path === "main.ts" ? 700 : 300));
  assert.deepEqual(long, []);
});

it("the code is erasable TypeScript without any, and nothing in it is left to do", () => {
  const banned: [string, RegExp][] = [
    ["enum", /\benum\s+\w+\s*\{/],
    ["namespace", /^\s*(?:export\s+|declare\s+)*namespace\s+[\w.]+\s*\{/],
    ["any", /(?:[:<,|&=(]|\bas)\s*any\b(?!\s*[:(])/],
    ["a parameter property", /\bconstructor\((?:[^)]*,)?\s*(?:private|public|protected|readonly)\s/],
    ["private instead of #", /^\s*(?:private|protected)\s(?!constructor\b)/],
    ["@ts-ignore", /@ts-ignore|@ts-nocheck/],
  ];
  const found: string[] = [];
  for (
    const path of ["main.ts", ...codeOf("plugins"), ...codeOf("test")].filter((path) => path !== "test/house.test.ts")
  ) {
    bare(read(path)).split("\n").forEach((line, i) => {
      for (const [what, pattern] of banned) {
        if (pattern.test(line)) found.push(`${path}:${i + 1}: ${what}: ${line.trim()}`);
      }
    });
    for (const [word] of read(path).matchAll(/\b(?:TODO|FIXME|XXX)\b/g)) found.push(`${path}: ${word}`);
  }
  assert.deepEqual(found, []);
});

it("each plugin file is named as its plugin, and is a default export", () => {
  const plugins = readdirSync(join(ROOT, "plugins")).filter((entry) => entry !== "shared");
  for (const entry of plugins) {
    const path = entry.endsWith(".ts") ? `plugins/${entry}` : `plugins/${entry}/mod.ts`;
    const name = entry.replace(/\.ts$/, "");
    assert.ok(existsSync(join(ROOT, path)), `${path} is missing`);
    assert.match(read(path), /^export default /m, path);
    assert.match(read(path), new RegExp(`\\bname: "${name}"`), path);
  }
});

it("each error code is raised somewhere in main.ts or plugins/", () => {
  const table = "plugins/shared/errors.ts";
  const code = ["main.ts", ...codeOf("plugins")].filter((path) => path !== table).map(read).join("\n");
  const unused = Object.keys(ERRORS).filter((each) => !code.includes(`"${each}"`));
  assert.deepEqual(unused, []);
});

it("README.md lists the codes of plugins/shared/errors.ts, each once, and no others", () => {
  assert.ok(filesOf(".").includes("README.md"), "README.md is missing");
  const section = read("README.md").split(/^#+ /m).find((part) => part.startsWith("Errors\n"));
  assert.ok(section, 'README.md has no section "Errors"');
  const listed = [...section.matchAll(/^\| *`(\w+)` *\|/gm)].map(([, code]) => code);
  const codes = Object.keys(ERRORS);
  assert.deepEqual({ missing: codes.filter((each) => !listed.includes(each)) }, { missing: [] });
  assert.deepEqual({ unknown: listed.filter((each) => !codes.includes(each)) }, { unknown: [] });
  assert.equal(new Set(listed).size, listed.length, "a code is listed twice");
});

it("no file names a package registry or a path of somebody's machine", () => {
  const banned: [string, RegExp][] = [
    ["a registry", /https?:\/\/[\w.:-]*(?:registry|artifactory|nexus|verdaccio)[\w.:-]*|^\s*registry\s*=|"resolved":/m],
    ["a path of a machine", /(?<![\w.$}-])\/(?:(?:home|Users|work|workspace)\/[\w.-]|root\/\.)[\w.\/-]*/],
  ];
  const found: string[] = [];
  for (const path of filesOf(".").filter((path) => path !== "test/house.test.ts")) {
    for (const [what, pattern] of banned) {
      const match = read(path).match(pattern);
      if (match) found.push(`${path}: ${what}: ${match[0]}`);
    }
  }
  assert.deepEqual(found, []);
});

it("no test changes its process, in which others run at the same time", () => {
  const changes = /\bprocess\.(?:env(?:\.\w+|\[[^\]]+\]) = |chdir\(|umask\([^)])/;
  const changed = codeOf("test").filter((path) => path.endsWith(".test.ts") && changes.test(bare(read(path))));
  assert.deepEqual(changed, []);
});
