import * as v from "valibot";
import { type Api, DormouseError, type Instance } from "../../main.ts";
import { messageOf } from "../shared/errors.ts";
import { formatSize } from "../shared/size.ts";
import type { Image } from "./image.ts";
import type { Images } from "./images.ts";

const Shown = v.pipe(
  v.object({
    name: v.string(),
    status: v.picklist(["ready", "failed"]),
    error: v.pipe(v.nullable(v.string()), v.description("Why it cannot be used")),
    arch: v.optional(v.string()),
    vcpus: v.optional(v.number()),
    size: v.optional(v.string()),
    agent: v.optional(v.boolean()),
    disk: v.optional(v.nullable(v.picklist(["raw", "qcow2"]))),
  }),
  v.metadata({ ref: "Image" }),
);
const Body = v.pipe(
  v.strictObject({
    name: v.pipe(v.string(), v.description("a-z, 0-9 and inner dots, hyphens and underscores")),
    path: v.pipe(v.string(), v.description("Of a folder of this host with an image.toml; it is copied")),
  }),
  v.metadata({ ref: "ImportImageRequest" }),
);

export interface RouteParts {
  images: Images;
  /** Those that may be made of images. */
  instances(): Instance[];
}

/** `GET /images`, `GET /images/{name}`, `POST /images`, `DELETE /images/{name}`. */
export function imageRoutes(api: Api, { images, instances }: RouteParts): void {
  const one = { 200: { description: "The image", schema: Shown } };
  api.route({
    method: "GET",
    path: "/images",
    scope: "image:read",
    summary: "The images of this host, those that cannot be used included",
    responses: { 200: { description: "The images", schema: v.array(Shown) } },
    handle: () => ({ status: 200, body: images.names().map((name) => orFailed(images, name)) }),
  });
  api.route({
    method: "GET",
    path: "/images/:name",
    scope: "image:read",
    summary: "One image",
    responses: one,
    handle: ({ params }) => ({ status: 200, body: present(images.readNamed(params.name)) }),
  });
  api.route({
    method: "POST",
    path: "/images",
    scope: "image:write",
    summary: "Imports an image from a folder of this host",
    long: true,
    body: Body,
    responses: { 201: { description: "The image", schema: Shown } },
    handle: async ({ body }) => {
      const { name, path } = body as v.InferOutput<typeof Body>;
      return { status: 201, body: present(await images.add(name, path)) };
    },
  });
  api.route({
    method: "DELETE",
    path: "/images/:name",
    scope: "image:write",
    summary: "Removes an image that no instance is made of",
    responses: { 204: { description: "It is removed" } },
    handle: async ({ params: { name } }) => {
      const user = instances().find(({ image }) => images.isSame(image, name));
      if (user) {
        throw new DormouseError("image_in_use", `Cannot delete image "${name}": instance "${user.name}" is made of it`);
      }
      await images.remove(name);
      return { status: 204 };
    },
  });
}

function orFailed(images: Images, name: string): v.InferOutput<typeof Shown> {
  try {
    return present(images.read(name));
  } catch (error) {
    return { name, status: "failed", error: messageOf(error) };
  }
}

function present({ name, arch, vcpus, size, agent, disk }: Image): v.InferOutput<typeof Shown> {
  return { name, status: "ready", error: null, arch, vcpus, size: formatSize(size), agent, disk: disk?.format ?? null };
}
