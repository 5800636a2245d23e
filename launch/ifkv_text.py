#!/usr/bin/env python3
"""Turn text into ifkv requests (`pack`) and answer ids back into text (`unpack`).

The C side knows token ids only; this file owns the tokenizer, the chat template and the shape of
text inputs.  It refuses to guess: a chat template it does not know, a tokenizer part the library
does not know, and text that cannot become ids without loss are errors, never approximated.

Always holds: no id comes from a tokenizer default (no automatic begin-of-text), the template is the
same for every method, and special tokens are written by the template alone unless --parse-special.

Exit: 0 done, 2 usage, 65 bad data, 66 input missing, 73 output cannot be created, 74 I/O error,
77 permission, 78 model not supported.
"""
import argparse
import json
import os
import re
import sys
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

EXIT_DATA, EXIT_MISSING = 65, 66
EXIT_CANNOT_CREATE, EXIT_IO, EXIT_PERMISSION, EXIT_UNSUPPORTED = 73, 74, 77, 78

MAX_TOKENIZER_BYTES = 256 << 20
MAX_CONFIG_BYTES = 16 << 20
MAX_LINE_BYTES = 256 << 20

LONE_SURROGATE = re.compile("[\ud800-\udfff]")

INSTRUCTION = "Answer the question from the passages above, in a few words."

# A family is known by its special tokens.  Template pieces alternate between special tokens, which
# must exist in the vocabulary, and plain text.
FAMILIES = {
    "ChatML": {
        "prefix": ("<|im_start|>", "user\n"),
        "end": ("<|im_end|>", "\n", "<|im_start|>", "assistant\n"),
    },
    "Llama 3": {
        "prefix": ("<|begin_of_text|>", "<|start_header_id|>", "user", "<|end_header_id|>", "\n\n"),
        "end": ("<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"),
    },
}
TOKENIZER_PARTS = ("normalizer", "pre_tokenizer", "model", "post_processor", "decoder")
MODEL_TYPES = ("BPE", "Unigram", "WordLevel", "WordPiece")


class Failure(Exception):
    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def bad_data(where, what, got, expected):
    return Failure(EXIT_DATA, f"{where}: {what}: got {got}, expected {expected}")


def shown(value):
    """An untrusted value as printable ASCII, cut to what fits in a message."""
    text = ascii(value)
    return text if len(text) <= 120 else text[:117] + "..."


def os_failure(error, path, code):
    if isinstance(error, PermissionError):
        code = EXIT_PERMISSION
    return Failure(code, f"{path}: {error.strerror or error}")


# Reading

def read_bytes(path, limit=None):
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if limit is not None and size > limit:
                raise bad_data(path, "size", f"{size} bytes", f"at most {limit}")
            return file.read()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise os_failure(error, path, EXIT_MISSING) from None
    except OSError as error:
        raise os_failure(error, path, EXIT_IO) from None


def decode_utf8(data, path, utf8, first_line=1):
    """Decode without touching line ends; `utf8` is error or replace."""
    try:
        return data.decode("utf-8", "strict" if utf8 == "error" else "replace")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise bad_data(f"{path}:{line}", f"byte {error.start}", f"0x{data[error.start]:02x}",
                       "UTF-8 (--utf8 replace accepts it)") from None


def without_surrogates(value, where, utf8):
    """Refuse or replace half surrogate pairs, which JSON and argv can smuggle in, at any depth of value."""
    if isinstance(value, str):
        found = LONE_SURROGATE.search(value)
        if found and utf8 == "error":
            raise bad_data(where, f"character {found.start()}", f"lone surrogate U+{ord(found[0]):04X}",
                           "Unicode text (--utf8 replace accepts it)")
        return LONE_SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [without_surrogates(item, f"{where}/{i}", utf8) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {without_surrogates(key, where, utf8): without_surrogates(item, f"{where}/{key}", utf8)
                for key, item in value.items()}
    return value


def unique_keys(pairs):
    result = dict(pairs)
    if len(result) != len(pairs):
        seen = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {shown(repeated)} occurs twice")
    return result


def refuse_constant(name):
    raise ValueError(f"number {name} is not JSON")


def parse_json(text, where):
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise bad_data(where, f"character {error.pos}", error.msg, "JSON") from None
    except ValueError as error:
        raise bad_data(where, "JSON", error, "one value per key and finite numbers") from None
    except RecursionError:
        raise bad_data(where, "JSON", "too many levels", "a flat object") from None


def read_json(path, limit):
    return parse_json(decode_utf8(read_bytes(path, limit), path, "error"), path)


def read_json_lines(path, utf8):
    """Yield (where, object) for each line that is not blank; `-` is standard input."""
    name = "<stdin>" if path == "-" else path
    try:
        with open(0 if path == "-" else path, "rb") as file:
            number = 0
            while True:
                raw = file.readline(MAX_LINE_BYTES + 1)
                number += 1
                if not raw:
                    return
                if len(raw) > MAX_LINE_BYTES:
                    raise bad_data(f"{name}:{number}", "line", f"more than {MAX_LINE_BYTES} bytes", "less")
                if raw.isspace():
                    continue
                where = f"{name}:{number}"
                value = parse_json(decode_utf8(raw, name, utf8, number), where)
                if not isinstance(value, dict):
                    raise bad_data(where, "line", type(value).__name__, "a JSON object")
                yield where, without_surrogates(value, where, utf8)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise os_failure(error, name, EXIT_MISSING) from None
    except OSError as error:
        raise os_failure(error, name, EXIT_IO) from None


def list_documents(arguments):
    """Files as given; a directory stands for its files (no hidden ones, no subdirectories) by name."""
    paths = []
    for argument in arguments:
        if not os.path.isdir(argument):
            paths.append(argument)
            continue
        try:
            names = sorted(entry.name for entry in os.scandir(argument)
                           if entry.is_file() and not entry.name.startswith("."))
        except OSError as error:
            raise os_failure(error, argument, EXIT_IO) from None
        if not names:
            raise Failure(EXIT_MISSING, f"{argument}: documents: got none, expected at least one file")
        paths += [os.path.join(argument, name) for name in names]
    return paths


# Tokenizer

def find_unknown_part(parts):
    """Name the part of a tokenizer.json whose type the library does not know, or None."""
    from tokenizers import Tokenizer

    model = parts.get("model")
    model_type = model.get("type", "BPE") if isinstance(model, dict) else model
    if model_type not in MODEL_TYPES:
        return f"/model/type: got {shown(model_type)}, expected one of {', '.join(MODEL_TYPES)}"
    # Each remaining part beside an empty model: the one that does not load is the one.
    empty = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
             **dict.fromkeys(TOKENIZER_PARTS), "model": {"type": "BPE", "vocab": {}, "merges": []}}
    for name in TOKENIZER_PARTS:
        for pointer, member in sequence_members(f"/{name}", parts.get(name)) if name != "model" else ():
            try:
                Tokenizer.from_str(json.dumps({**empty, name: member}))
            except Exception:  # the library raises plain Exception
                kind = member.get("type") if isinstance(member, dict) else member
                return f"{pointer}/type: got {shown(kind)}, expected one that the tokenizers library knows"
    return None


def sequence_members(pointer, part):
    """Yield (pointer, part) for a part of a tokenizer, or for the members if it is a sequence of parts."""
    if not isinstance(part, dict) or part.get("type") != "Sequence":
        yield pointer, part
        return
    # The list is called pretokenizers, normalizers, decoders or processors.
    for key, value in part.items():
        for number, member in enumerate(value if isinstance(value, list) else ()):
            yield from sequence_members(f"{pointer}/{key}/{number}", member)


def check_vocabulary(tokenizer, parts, path):
    tokens = {}
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index in tokens:
            raise bad_data(path, f"id {index}", f"{shown(tokens[index])} and {shown(token)}", "one token per id")
        tokens[index] = token
    gap = next((index for index in range(len(tokens)) if index not in tokens), None)
    if gap is not None:
        raise bad_data(path, f"id {gap}", "no token", f"ids without gaps up to {max(tokens)}")
    for number, added in enumerate(parts.get("added_tokens") or []):
        index = tokenizer.token_to_id(added["content"])
        if index != added["id"]:
            raise bad_data(f"{path}/added_tokens/{number}", "id", added["id"],
                           f"{index}, where the vocabulary has {shown(added['content'])}")


def load_tokenizer(model):
    """Return (tokenizer, parsed tokenizer.json), checked."""
    from tokenizers import Tokenizer

    path = os.path.join(model, "tokenizer.json")
    if not os.path.exists(path):
        if os.path.exists(os.path.join(model, "tokenizer.model")):
            raise Failure(EXIT_UNSUPPORTED, f"{model}: tokenizer: got tokenizer.model alone, expected tokenizer.json "
                                            "(requests of token ids need none)")
        raise Failure(EXIT_MISSING, f"{path}: no such file (requests of token ids need none)")
    data = read_bytes(path, MAX_TOKENIZER_BYTES)
    text = decode_utf8(data, path, "error")
    parts = parse_json(text, path)
    if not isinstance(parts, dict):
        raise bad_data(path, "tokenizer", type(parts).__name__, "a JSON object")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        unknown = find_unknown_part(parts)
        if unknown:
            raise Failure(EXIT_UNSUPPORTED, f"{path}{unknown}") from None
        raise bad_data(path, "tokenizer", shown(str(error)), "one that loads") from None
    check_vocabulary(tokenizer, parts, path)
    # A stored padding or truncation would change ids behind our back.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, parts


def read_vocabulary_size(model):
    path = os.path.join(model, "config.json")
    config = read_json(path, MAX_CONFIG_BYTES)
    if isinstance(config, dict) and "vocab_size" not in config:
        config = config.get("text_config")
    size = config.get("vocab_size") if isinstance(config, dict) else None
    if type(size) is not int or size < 1:
        raise bad_data(path, "vocab_size", shown(size), "a positive integer")
    return size


class TextEncoder:
    """Text and template pieces to ids of one model."""

    def __init__(self, model, utf8, parse_special):
        self.tokenizer, parts = load_tokenizer(model)
        path = os.path.join(model, "tokenizer.json")
        n_token, n_row = self.tokenizer.get_vocab_size(), read_vocabulary_size(model)
        if n_token > n_row:
            raise bad_data(path, "vocabulary", f"{n_token} tokens", f"at most the model's {n_row}")
        self.replaces = utf8 == "replace"
        self.parse_special = parse_special
        self.special = [added["content"] for added in parts.get("added_tokens") or [] if added.get("special")]
        # Bytes without a token vanish silently; only a byte-level decoder gives the text back to compare.
        self.is_byte_level = "ByteLevel" in json.dumps(parts.get("decoder"))
        self.family = self._find_family(path)
        self.prefix = self.encode_template(FAMILIES[self.family]["prefix"])
        self.end = self.encode_template(FAMILIES[self.family]["end"])

    def _find_family(self, path):
        known = set(self.special)
        needed = {name: [piece for piece in family["prefix"] + family["end"] if piece.startswith("<|")]
                  for name, family in FAMILIES.items()}
        for name, tokens in needed.items():
            if known.issuperset(tokens):
                return name
        expected = " or ".join(f"{name} ({' '.join(dict.fromkeys(tokens))})" for name, tokens in needed.items())
        raise Failure(EXIT_UNSUPPORTED, f"{path}: chat template: got special tokens {shown(' '.join(self.special))}, "
                                        f"expected {expected}")

    def encode_template(self, pieces):
        ids = []
        for piece in pieces:
            ids += [self.tokenizer.token_to_id(piece)] if piece in self.special else self._encode([piece])[0]
        return ids

    def spells_special(self, text):
        return any(token in text for token in self.special)

    def _encode(self, texts):
        # The switch makes the library treat the text of a special token like any other text.
        self.tokenizer.encode_special_tokens = not self.parse_special
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode(self, sources):
        """Encode a list of (where, text); where goes into errors."""
        texts = [text for _, text in sources]
        result = self._encode(texts)
        for i, (where, _) in enumerate(sources):
            lost = self._find_lost(texts[i], result[i])
            if not lost:
                continue
            if not self.replaces:
                position = min(texts[i].index(character) for character in lost)
                raise bad_data(where, f"byte {len(texts[i][:position].encode())}",
                               f"U+{ord(texts[i][position]):04X}, for which the vocabulary has no tokens",
                               "encodable text (--utf8 replace accepts it)")
            result[i] = self._encode([texts[i].translate(dict.fromkeys(map(ord, lost), "\ufffd"))])[0]
        return result

    def _find_lost(self, text, ids):
        """The characters of text that have no tokens of their own."""
        if not self.is_byte_level:
            return []
        normalizer = self.tokenizer.normalizer
        def normalized(part):
            return normalizer.normalize_str(part) if normalizer else part
        def decoded(part_ids):
            return self.tokenizer.decode(part_ids, skip_special_tokens=False)
        if decoded(ids) == normalized(text):
            return []
        characters = sorted(set(text))
        return [character for character, part_ids in zip(characters, self._encode(characters))
                if decoded(part_ids) != normalized(character)]


# Requests

def as_document(text):
    """The separator belongs to the document: a blank line in place of the line ends the file closes with."""
    return text.rstrip("\r\n") + "\n\n"


class Packer:
    """Makes requests of one encoder and one set of options."""

    def __init__(self, encoder, instruction, chunk, max_new):
        self.encoder = encoder
        self.instruction = instruction
        self.chunk = chunk
        self.max_new = max_new
        self.n_spelled = 0  # texts that spell a special token

    def pack(self, name, question, documents, context=None, answers=None, meta=None):
        """question, context: (where, text); documents: list of (where, text), used if context is None."""
        for where, text in [question, *documents, *([context] if context else [])]:
            if not text.strip():
                raise bad_data(where, "text", "none", "at least one character")
            self.n_spelled += self.encoder.spells_special(text)
        asked = (question[0], f"{self.instruction}\nQuestion: {question[1]}" if self.instruction else question[1])
        bare, prompt = self.encoder.encode([question, asked])
        request = {"id": name, "prefix": self.encoder.prefix}
        chunks = self.encoder.encode([(where, as_document(text)) for where, text in documents or [context]])
        if self.chunk:
            tokens = [token for chunk in chunks for token in chunk]
            request["chunks"] = [tokens[begin:begin + self.chunk] for begin in range(0, len(tokens), self.chunk)]
        elif documents:
            request["chunks"] = chunks
        else:
            request["context"] = chunks[0]
        request["prompt"] = prompt + self.encoder.end
        request["question"] = bare
        if answers is not None:
            request["answers"] = answers
        if self.max_new is not None:
            request["max_new"] = self.max_new
        if self.encoder.parse_special:
            meta = {**(meta or {}), "parse_special": True}
        if meta is not None:
            request["meta"] = meta
        return request


def string_member(value, key, where):
    if not isinstance(value.get(key), str):
        got = type(value[key]).__name__ if key in value else "nothing"
        raise bad_data(f"{where}/{key}", "value", got, "a string")
    return f"{where}/{key}", value[key]


def list_member(value, key, where):
    member = value[key]
    if not isinstance(member, list):
        raise bad_data(f"{where}/{key}", "value", type(member).__name__, "a list of strings")
    for number, item in enumerate(member):
        if not isinstance(item, str):
            raise bad_data(f"{where}/{key}/{number}", "value", type(item).__name__, "a string")
    return member


def requests_of_json_lines(packer, path, utf8, limit):
    """One request for each object: question and passages (MuSiQue), or input and context (LongBench)."""
    stem = "request" if path == "-" else Path(path).stem
    seen = {}
    for number, (where, value) in enumerate(islice(read_json_lines(path, utf8), limit)):
        name = value.get("id", value.get("_id", f"{stem}-{number:03d}"))
        if type(name) is int:
            name = str(name)
        if not isinstance(name, str) or not name:
            raise bad_data(f"{where}/id", "value", shown(name), "a non-empty string")
        if name in seen:
            raise bad_data(f"{where}/id", "value", shown(name), f"an id not used before (see {seen[name]})")
        seen[name] = where
        if ("passages" in value) == ("context" in value):
            raise bad_data(where, "text", "both passages and context" if "context" in value else "neither passages nor context",
                           "one of them")
        question = string_member(value, "question" if "question" in value else "input", where)
        meta = value.get("meta")
        if meta is not None and not isinstance(meta, dict):
            raise bad_data(f"{where}/meta", "value", type(meta).__name__, "an object")
        documents, context = [], None
        if "passages" in value:
            documents = [(f"{where}/passages/{i}", text) for i, text in enumerate(list_member(value, "passages", where))]
            if not documents:
                raise bad_data(f"{where}/passages", "value", "an empty list", "at least one passage")
        else:
            context = string_member(value, "context", where)
        answers = list_member(value, "answers", where) if "answers" in value else None
        yield packer.pack(name, question, documents, context, answers, meta)
    if not seen:
        raise bad_data(path, "objects", "none", "at least one line")


def request_of_files(packer, question, arguments, utf8):
    documents = [(path, decode_utf8(read_bytes(path), path, utf8)) for path in list_documents(arguments)]
    question = ("--question", without_surrogates(question, "--question", utf8))
    return packer.pack("question", question, documents)


# Writing

@contextmanager
def open_output(path):
    """A text file that appears under its name only when the block ends well; None is standard output.

    A device or a pipe is written to and not renamed over; a link keeps pointing to its file.
    """
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    if os.path.exists(path) and not os.path.isfile(path):
        try:
            with open(path, "w", encoding="utf-8", newline="\n") as file:
                yield file
        except OSError as error:
            raise os_failure(error, path, EXIT_CANNOT_CREATE if isinstance(error, IsADirectoryError) else EXIT_IO) from None
        return
    path = os.path.realpath(path)
    scratch = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}.tmp")
    try:
        file = open(scratch, "x", encoding="utf-8", newline="\n")
    except OSError as error:
        raise os_failure(error, path, EXIT_CANNOT_CREATE) from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException as error:
        os.unlink(scratch)
        if isinstance(error, OSError):
            raise os_failure(error, path, EXIT_IO) from None
        raise


def write_line(file, value):
    # Escaped text survives whatever encoding the terminal or the file system has.
    file.write(json.dumps(value, separators=(",", ":")) + "\n")


def run_pack(options):
    encoder = TextEncoder(options.model, options.utf8, options.parse_special)
    packer = Packer(encoder, options.instruction, options.chunk, options.max_new)
    with open_output(options.out) as file:
        if options.jsonl is not None:
            for request in requests_of_json_lines(packer, options.jsonl, options.utf8, options.limit):
                write_line(file, request)
        else:
            write_line(file, request_of_files(packer, options.question, options.docs, options.utf8))
    if packer.n_spelled and not encoder.parse_special:
        print(f"ifkv_text: note: {packer.n_spelled} texts spell special tokens; they were encoded as plain text",
              file=sys.stderr)


def run_unpack(options):
    tokenizer, _ = load_tokenizer(options.model)
    n_token = tokenizer.get_vocab_size()
    path = os.path.join(options.results, "results.jsonl") if os.path.isdir(options.results) else options.results
    with open_output(options.out) as file:
        for where, result in read_json_lines(path, "error"):
            _, name = string_member(result, "id", where)
            ids = result.get("answer_ids")
            if not isinstance(ids, list):
                raise bad_data(f"{where}/answer_ids", "value", type(ids).__name__, "a list of token ids")
            for number, index in enumerate(ids):
                if type(index) is not int or not 0 <= index < n_token:
                    raise bad_data(f"{where}/answer_ids/{number}", "value", shown(index), f"an id below {n_token}")
            answer = tokenizer.decode(ids, skip_special_tokens=True)
            if options.plain:
                file.write(answer.strip() + "\n")
                continue
            carried = {key: result[key] for key in ("answers", "meta") if key in result}
            write_line(file, {"id": name, "answer": answer, **carried})


def count(minimum):
    def parse(text):
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"got {shown(text)}, expected an integer from {minimum}")
        return int(text)
    return parse


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(prog="ifkv_text", allow_abbrev=False,
                                     description="Turn text into ifkv requests and answer ids back into text.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="pack|unpack")

    pack = commands.add_parser("pack", allow_abbrev=False, help="text to requests (JSONL)",
                               description="Write ifkv requests for text documents and questions.")
    pack.add_argument("--model", required=True, metavar="DIR", help="directory with tokenizer.json and config.json")
    pack.add_argument("--question", metavar="TEXT", help="one request: this question over --docs")
    pack.add_argument("--docs", nargs="+", metavar="PATH", help="text files, or directories of them; each file is a chunk")
    pack.add_argument("--jsonl", metavar="FILE", help="one request a line: question and passages, or input and context; - is standard input")
    pack.add_argument("--limit", type=count(1), metavar="N", help="take the first N lines of --jsonl")
    pack.add_argument("--chunk", type=count(1), metavar="N",
                      help="re-cut every context every N tokens (default: one chunk a document; a context string is left whole)")
    pack.add_argument("--max-new", type=count(0), metavar="N", help="ask for at most N answer tokens")
    pack.add_argument("--instruction", default=INSTRUCTION, metavar="TEXT", help="what precedes the question; may be empty (default: %(default)s)")
    pack.add_argument("--parse-special", action="store_true", help="turn the text of special tokens in documents and questions into those tokens")
    pack.add_argument("--utf8", choices=("error", "replace"), default="error", help="what to do with bytes that are not text (default: error)")
    pack.add_argument("--out", metavar="FILE", help="default: standard output")
    pack.set_defaults(run=run_pack)

    unpack = commands.add_parser("unpack", allow_abbrev=False, help="answer ids to text",
                                 description="Write the answers in the results of `ifkv prefill` as text.")
    unpack.add_argument("--model", required=True, metavar="DIR", help="directory with tokenizer.json")
    unpack.add_argument("--results", required=True, metavar="OUT", help="output directory of ifkv prefill, or its results.jsonl")
    unpack.add_argument("--plain", action="store_true", help="the answers alone, one a line, instead of JSONL")
    unpack.add_argument("--out", metavar="FILE", help="default: standard output")
    unpack.set_defaults(run=run_unpack)

    options = parser.parse_args(arguments)
    if options.command == "pack":
        if (options.question is None) == (options.jsonl is None) or (options.question is None) != (options.docs is None):
            pack.error("expected either --question with --docs, or --jsonl")
        if options.limit is not None and options.jsonl is None:
            pack.error("--limit needs --jsonl")
        if options.question is not None and not options.question.strip():
            pack.error("argument --question: got no text")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    try:
        options.run(options)
    except Failure as failure:
        print(f"ifkv_text: error: {failure}", file=sys.stderr)
        return failure.code
    except BrokenPipeError:
        # The reader has gone; what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_IO
    except OSError as error:
        print(f"ifkv_text: error: <stdout>: {error.strerror or error}", file=sys.stderr)
        return EXIT_IO
    return 0


if __name__ == "__main__":
    sys.exit(main())
