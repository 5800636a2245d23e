/* Exchange `local`: nothing travels but the prefix, a row sees its own rank's shard.
 *
 * The control experiment: not exact for more than one rank, and its results depend on the number of
 * ranks. */
#include "exchange_owned.h"

enum { N_PART = IFKV_OWNED_SHARD + 1 };

static void local_layout(ifkv_exchange *exchange, ifkv_arena *arena) {
    ifkv_exchange_owned_layout((ifkv_exchange_owned *)exchange, arena, N_PART);
}

static ifkv_status local_attend(ifkv_exchange *exchange, int layer, const ifkv_view *q,
                                const ifkv_view *out) {
    ifkv_exchange_owned *x = (ifkv_exchange_owned *)exchange;
    IFKV_TRY(ifkv_exchange_owned_attend(x, layer, q));
    return ifkv_exchange_owned_merge(x, N_PART, out);
}

const ifkv_exchange_ops ifkv_exchange_local_ops = {
    .name = "local",
    .struct_bytes = sizeof(ifkv_exchange_owned),
    .is_home_owner = true,
    .is_exact = false,
    .init = ifkv_exchange_owned_init,
    .fini = ifkv_exchange_owned_fini,
    .layout_shared = ifkv_exchange_owned_layout_shared,
    .layout = local_layout,
    .share = ifkv_exchange_owned_share,
    .begin = ifkv_exchange_owned_begin,
    .store = ifkv_exchange_owned_store,
    .attend = local_attend,
    .bytes = ifkv_exchange_owned_bytes,
    .explain = "a row sees its own rank's keys and the prefix only; nothing travels; not exact, "
               "for comparison",
};
