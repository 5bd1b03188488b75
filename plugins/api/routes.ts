import { type ApiRoute, DormouseError } from "../../main.ts";
import { SCOPE } from "./access.ts";

const METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"];

/** The routes of all plugins, until the app is made from them. */
export class RouteTable {
  readonly #routes: ApiRoute[] = [];
  #closed = false;

  /** @throws {TypeError} for a route that could not be served as it is meant, such as one without a scope */
  add(route: ApiRoute): void {
    const { method, path, scope } = route;
    const wrong = (what: string) => new TypeError(`Cannot add route ${method} ${path}: ${what}`);
    if (this.#closed) throw wrong("the API is already up");
    if (!METHODS.includes(method)) throw wrong(`its method is none of ${METHODS.join(", ")}`);
    if (!/^\/\S*$/.test(path)) throw wrong("its path does not begin with /");
    // A route that nobody thought about must not be open to everybody.
    if (!scope) throw wrong("it has no scope");
    if (!SCOPE.test(scope)) throw wrong(`its scope "${scope}" is not "public" or like "instance:read"`);
    if (typeof route.responses !== "object" || route.responses === null) throw wrong("it has no responses");
    if (this.has(method, path)) throw wrong("it is there already");
    this.#routes.push(route);
  }

  has(method: string, path: string): boolean {
    return this.#routes.some((other) => other.method === method && shape(other.path) === shape(path));
  }

  /** All routes, those without parameters first; no more can be added. */
  take(): ApiRoute[] {
    this.#closed = true;
    // Hono takes the first that matches: `/instances/usage` of a later plugin must come before `/instances/:id`.
    return this.#routes.toSorted((a, b) => parameters(a.path) - parameters(b.path));
  }
}

function shape(path: string): string {
  return path.replaceAll(/:[^/]+/g, ":");
}

function parameters(path: string): number {
  return path.split("/:").length;
}

/** An answer whose JSON text is there already. */
export class JsonText {
  readonly text: string;
  constructor(text: string) {
    this.text = text;
  }
}

/** The JSON list of items, each by its text. Added up one by one, which is what engines are fastest at: not joined. */
export function jsonList<T>(items: Iterable<T>, textOf: (item: T) => string): string {
  let text = "";
  for (const item of items) text += text === "" ? textOf(item) : `,${textOf(item)}`;
  return `[${text}]`;
}

/** For a client that asks too late. */
export function closingError(): DormouseError {
  return new DormouseError("shutting_down", "Cannot answer: the host is closing");
}
