import { createHash } from "node:crypto";
import type { Api } from "../../main.ts";
import type { App } from "./app.ts";
import { openApiOf } from "./openapi.ts";

/** `/openapi.json` and `/docs`. Returns what to hand the app to once it is made of all routes. */
export function documentRoutes(api: Api, version: string): (app: App) => void {
  let app: App | undefined;
  let document: Promise<string> | undefined;

  api.route({
    method: "GET",
    path: "/openapi.json",
    scope: "public",
    summary: "This API as an OpenAPI 3.1 document",
    responses: { 200: { description: "The document" } },
    async handle() {
      // Made when first asked for: it needs a library that the start of the host should not wait for.
      document ??= openApiOf(app!, version).then((made) => JSON.stringify(made));
      return new Response(await document, { headers: { "Content-Type": "application/json" } });
    },
  });

  api.route({
    method: "GET",
    path: "/docs",
    scope: "public",
    summary: "This API as a page to read",
    responses: { 200: { description: "The page" } },
    handle: () => new Response(PAGE, { headers: PAGE_HEADERS }),
  });

  return (made) => void (app = made);
}

const STYLE = `
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin: 2.5rem 0 .5rem; text-transform: capitalize; }
summary { cursor: pointer; padding: .35rem 0; }
summary code { font-weight: 600; }
.method { display: inline-block; width: 4.5rem; font: 600 .8rem ui-monospace, monospace; }
.note { opacity: .75; }
table { border-collapse: collapse; margin: .5rem 0; }
td, th { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; }
pre { overflow: auto; padding: .75rem; border: 1px solid #8886; border-radius: .4rem; font-size: .85rem; }
details details { margin-left: 1rem; }
`;

// Text is only ever set as text: names and descriptions come from plugins.
const SCRIPT = `
const make = (tag, options = {}, ...children) => {
  const { text, name } = options;
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  node.append(...children);
  return node;
};
const nameOf = (ref) => ref.split("/").pop();
const typeOf = (schema = {}) => {
  if (schema.$ref) return nameOf(schema.$ref);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  const either = schema.anyOf || schema.oneOf;
  if (either) return either.map(typeOf).join(" | ");
  if (schema.type === "array") return typeOf(schema.items) + "[]";
  return schema.type || "any";
};
const alternatives = (schema) => [schema, ...(schema.anyOf || schema.oneOf || [])];
const rows = (schema, path) => alternatives(schema).flatMap((each) => each.type === "array" && each.items
  ? rows(each.items, path.slice(0, -1) + "[].")
  : Object.entries(each.properties || {}).flatMap(([key, value]) => [make("tr", {},
    make("td", {}, make("code", { text: path + key })),
    make("td", { text: typeOf(value) }),
    make("td", { text: (each.required || []).includes(key) ? "required" : "" }),
    make("td", { text: (alternatives(value).find((one) => one.description) || {}).description || "", name: "note" })),
    ...rows(value, path + key + ".")]));
const fields = (schema = {}) => make("table", {}, ...rows(schema, ""));
const body = (content = {}) => Object.entries(content).map(([type, { schema }]) =>
  make("p", {}, make("span", { text: type + ": " }), make("code", { text: typeOf(schema) })));
const operation = (method, path, op) => {
  const details = make("details", {}, make("summary", {},
    make("span", { text: method.toUpperCase(), name: "method" }),
    make("code", { text: path }), make("span", { text: " " + (op.summary || ""), name: "note" })));
  if (op.description) details.append(make("p", { text: op.description, name: "note" }));
  if (op.parameters && op.parameters.length) {
    details.append(make("table", {}, ...op.parameters.map((each) => make("tr", {},
      make("td", {}, make("code", { text: each.name })), make("td", { text: "in " + each.in }),
      make("td", { text: typeOf(each.schema) }), make("td", { text: each.required ? "required" : "" }),
      make("td", { text: each.description || "", name: "note" })))));
  }
  if (op.requestBody) details.append(make("h4", { text: "Body" }), ...body(op.requestBody.content));
  for (const [status, answer] of Object.entries(op.responses || {})) {
    details.append(make("p", {}, make("strong", { text: status + " " }), answer.description || ""), ...body(answer.content));
  }
  return details;
};
const show = (spec) => {
  const main = document.querySelector("main");
  main.replaceChildren(make("h1", { text: spec.info.title + " " + spec.info.version }), make("p", { text: spec.info.description }));
  const groups = new Map();
  for (const [path, item] of Object.entries(spec.paths)) {
    for (const [method, op] of Object.entries(item)) {
      const group = (op.tags || ["other"])[0];
      groups.set(group, [...(groups.get(group) || []), operation(method, path, op)]);
    }
  }
  for (const [group, operations] of groups) main.append(make("h2", { text: group }), ...operations);
  main.append(make("h2", { text: "Schemas" }));
  for (const [name, schema] of Object.entries((spec.components || {}).schemas || {})) {
    main.append(make("details", {}, make("summary", {}, make("code", { text: name })), fields(schema),
      make("details", {}, make("summary", { text: "as JSON Schema" }), make("pre", { text: JSON.stringify(schema, null, 2) }))));
  }
};
fetch("./openapi.json").then((answer) => answer.json()).then(show, (error) => {
  document.querySelector("main").textContent = "Cannot load ./openapi.json: " + error;
});
`;

const PAGE = `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Dormouse API</title>
<style>${STYLE}</style>
<body><main>Loading</main><noscript>The document is at <a href="./openapi.json">openapi.json</a>.</noscript>
<script>${SCRIPT}</script>
</body>
</html>
`;

const POLICY = `default-src 'none'; connect-src 'self'; style-src '${hashOf(STYLE)}'; script-src '${hashOf(SCRIPT)}'`;
const PAGE_HEADERS = {
  "Content-Type": "text/html; charset=utf-8",
  // The browser itself then refuses whatever is not in the page or from this host.
  "Content-Security-Policy": `${POLICY}; base-uri 'none'; frame-ancestors 'none'`,
};

function hashOf(text: string): string {
  return `sha256-${createHash("sha256").update(text).digest("base64")}`;
}
