import type { Commit, Event, Guard, Plugin } from "../../main.ts";

// Hooks and services of the tests' own, added the way a plugin adds its own.
declare module "../../main.ts" {
  interface Hooks {
    "test:guard": Guard<{ seen: string[] }>;
    "test:commit": Commit<{ seen: string[] }>;
    "test:event": Event<number>;
    "test:numbered": Event<{ seq: number }>;
  }
  interface Services {
    first: { readonly name: string };
    second: { readonly name: string };
  }
}

/** A plugin that does nothing but what `parts` say. */
export function plugin(name: string, parts: Partial<Plugin> = {}): Plugin {
  return { name, setup() {}, ...parts };
}
