/* Profiles of links.  See cli.h. */
#include <string.h>

#include "cli.h"
#include "json.h"

static ifkv_status read_number(const char *where, int i, const json_t *object, const char *name,
                               double *value_p) {
    const json_t *value = json_object_get(object, name);
    IFKV_REQUIRE(json_is_number(value) && json_number_value(value) >= 0, IFKV_ERR_DATA,
                 IFKV_E_VALUE, "%s /links/%d/%s: expected a number that is not negative", where, i,
                 name);
    *value_p = json_number_value(value);
    return IFKV_OK;
}

static ifkv_status read_link(const char *where, int i, const json_t *object, cli_link *link) {
    const char *name = json_string_value(json_object_get(object, "name"));
    IFKV_REQUIRE(name && strlen(name) < sizeof link->name, IFKV_ERR_DATA, IFKV_E_VALUE,
                 "%s /links/%d/name: expected text of at most %zu bytes", where, i,
                 sizeof link->name - 1);
    strcpy(link->name, name);
    IFKV_TRY(read_number(where, i, object, "alpha_us", &link->link.alpha_us));
    IFKV_TRY(read_number(where, i, object, "gbytes_per_s", &link->link.gbytes_per_s));
    IFKV_REQUIRE(link->link.gbytes_per_s > 0, IFKV_ERR_DATA, IFKV_E_VALUE,
                 "%s /links/%d/gbytes_per_s: got 0", where, i);
    return read_number(where, i, object, "control_us", &link->link.control_us);
}

ifkv_status cli_links_read(const char *path, cli_link *link, int *n_p) {
    const ifkv_json_limits limits = {.max_bytes = 1 << 20};
    char *text = NULL, shown[IFKV_QUOTE_BYTES];
    size_t bytes = 0;
    json_t *root = NULL;
    ifkv_path_quote(path, shown);
    IFKV_TRY(ifkv_file_read(path, limits.max_bytes, IFKV_E_ARGUMENT, &text, &bytes));
    ifkv_status status = ifkv_json_parse(shown, text, bytes, &limits, IFKV_E_VALUE, &root);
    free(text);
    IFKV_TRY(status);
    const json_t *list = json_object_get(root, "links");
    const size_t n = json_array_size(list);
    if (n < 1 || n > CLI_MAX_LINK)
        status = IFKV_FAIL(IFKV_ERR_DATA, IFKV_E_VALUE, "%s /links: expected a list of 1 to %d",
                           shown, CLI_MAX_LINK);
    for (size_t i = 0; i < n && status == IFKV_OK; i++)
        status = read_link(shown, (int)i, json_array_get(list, i), &link[i]);
    *n_p = (int)n;
    json_decref(root);
    return status;
}
