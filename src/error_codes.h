/* Stable numbers of error causes, printed as E%04d and matched by tests instead of prose.
 * A number is never reused; hundreds go by module.  The status (exit code) says what kind of
 * failure it is, the number which. */
#ifndef IFKV_SRC_ERROR_CODES_H
#define IFKV_SRC_ERROR_CODES_H

enum {
    /* 01xx command line and environment */
    IFKV_E_ARGUMENT = 101,    /* unknown flag or command */
    IFKV_E_VALUE = 102,       /* flag or option value out of range */
    IFKV_E_CONFLICT = 103,    /* two flags exclude each other */
    IFKV_E_STRUCT = 104,      /* options struct: NULL, or a size this library does not know */
    IFKV_E_STATE = 105,       /* call out of order */
    IFKV_E_INTERRUPTED = 106, /* stopped by a signal or the caller */
    /* 02xx config.json */
    IFKV_E_CONFIG_FILE = 201,  /* missing or unreadable */
    IFKV_E_CONFIG_JSON = 202,  /* not valid JSON */
    IFKV_E_CONFIG_MODEL = 203, /* model type or variant not implemented */
    IFKV_E_CONFIG_FIELD = 204, /* field missing, of the wrong type or out of range */
    IFKV_E_CONFIG_ROPE = 205,  /* rotary parameters unknown or contradictory */
    /* 03xx safetensors */
    IFKV_E_TENSOR_FILE = 301,    /* missing, unreadable or not a regular file */
    IFKV_E_TENSOR_HEADER = 302,  /* header malformed */
    IFKV_E_TENSOR_RANGE = 303,   /* offsets, shape and type do not fit each other or the file */
    IFKV_E_TENSOR_DTYPE = 304,   /* element type not supported */
    IFKV_E_TENSOR_CHANGED = 305, /* file changed while it was read */
    /* 04xx index, shards, weights as a set */
    IFKV_E_INDEX = 401,        /* index malformed, or shards and index disagree */
    IFKV_E_WEIGHTS = 402,      /* tensor missing or of the wrong shape */
    IFKV_E_WEIGHT_VALUE = 403, /* NaN or infinity in the weights */
    /* 05xx requests */
    IFKV_E_REQUEST_FILE = 501,   /* missing or unreadable */
    IFKV_E_REQUEST_JSON = 502,   /* not valid JSON, or not an object */
    IFKV_E_REQUEST_FIELD = 503,  /* unknown, missing or contradictory field */
    IFKV_E_REQUEST_TOKEN = 504,  /* a token id that is not an integer of the vocabulary */
    IFKV_E_REQUEST_LENGTH = 505, /* too long, too short, too many */
    /* 06xx HDF5 input */
    IFKV_E_H5_OPEN = 601,    /* not HDF5, truncated, in use */
    IFKV_E_H5_OBJECT = 602,  /* dataset or attribute missing or of the wrong kind */
    IFKV_E_H5_REFUSED = 603, /* external storage, link, filter or virtual dataset */
    IFKV_E_H5_DATA = 604,    /* stored data damaged */
    IFKV_E_H5_CRASH = 605,   /* the parser process died */
    /* 07xx output */
    IFKV_E_OUT_CREATE = 701, /* directory or file cannot be created */
    IFKV_E_OUT_WRITE = 702,  /* write, sync or rename failed */
    IFKV_E_OUT_LOCKED = 703, /* another job writes there */
    IFKV_E_OUT_EXISTS = 704, /* results of another run are there */
    IFKV_E_OUT_VERIFY = 705, /* stored data does not match its digest */
    IFKV_E_STORE = 706,      /* an entry of the chunk store is missing, damaged or not kept */
    /* 08xx ranks */
    IFKV_E_COMM = 801,        /* communicator unknown, not built or failed */
    IFKV_E_COMM_PEER = 802,   /* another rank failed */
    IFKV_E_COMM_LAUNCH = 803, /* launcher and communicator disagree on the number of ranks */
    IFKV_E_DIVERGED = 804,    /* ranks disagree on something they must share */
    /* 09xx engine */
    IFKV_E_MEMORY = 901,     /* not enough memory */
    IFKV_E_SHAPE = 902,      /* operands do not fit each other */
    IFKV_E_BACKEND = 903,    /* back end unknown, not built or failed */
    IFKV_E_NOT_FINITE = 904, /* NaN or infinity where a finite number must be */
    IFKV_E_MISMATCH = 905,   /* verification against the exact result failed */
    IFKV_E_NOT_BUILT = 906   /* named feature does not exist in this version */
};

#endif
