import { DormouseError, type Instance, type StandbyRequest } from "../../main.ts";
import type { Fields } from "./fields.ts";

/**
 * What the driver sees of an instance that is put to standby with wishes of its own: its policy with them laid over it.
 * Undefined where there are none.
 *
 * @throws {DormouseError} `feature_off`, or `invalid_snapshot_compression` as the field's owner says
 */
export function overridden(
  fields: Fields,
  instance: Instance,
  { compression, compression_delay }: StandbyRequest,
): Partial<Instance> | undefined {
  if (compression === undefined && compression_delay === undefined) return undefined;
  const body = {
    snapshot_policy: {
      ...instance.policies.snapshot_policy as object | undefined,
      ...(compression && { compression }),
      ...(compression_delay !== undefined && { standby_compression_delay: compression_delay }),
    },
  };
  if (compression?.enabled) fields.refuseOff(body);
  try {
    return { policies: fields.policies(body, instance) };
  } catch (error) {
    if (!(error instanceof DormouseError) || error.code !== "invalid_snapshot_policy") throw error;
    const field = String(error.details?.field).replace(/^snapshot_policy\./, "");
    const message = error.message.replace('"snapshot_policy.', '"');
    throw new DormouseError("invalid_snapshot_compression", message, { cause: error, details: { field } });
  }
}
