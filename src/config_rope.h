/* Rotary parameters of config.json in all their spellings.
 *
 * Owns the reconciliation of rope_theta, rope_scaling (type or rope_type) and rope_parameters;
 * private to config.c. */
#ifndef IFKV_SRC_CONFIG_ROPE_H
#define IFKV_SRC_CONFIG_ROPE_H

#include "config.h"
#include "config_field.h"

/* Fill the rope_* members of config, whose family is known, from the root object.  Errors:
 * UNSUPPORTED for an unknown or nested rope type, DATA for a missing or senseless number and where
 * two spellings disagree. */
ifkv_status ifkv_config_rope(const ifkv_field_scope *root, ifkv_config *config);

#endif
