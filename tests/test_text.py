"""Text packing, unpacking and the stage table of launch/, over a tiny tokenizer built here.

No network, no model weights: the tokenizer has 256 byte tokens, a few merges and special tokens.
"""
import contextlib
import io
import json
import os
import sys
import tempfile
import unittest
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))
import ifkv_text  # noqa: E402
import stage_table  # noqa: E402

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
REQUEST_KEYS = {"id", "prefix", "chunks", "context", "prompt", "question", "answers", "max_new", "meta"}
MERGES = (("u", "s"), ("us", "e"), ("use", "r"), ("\u0120", "t"), ("\u010a", "\u010a"))  # \u0120, \u010a: space, newline


def build_tokenizer(special, without_bytes=()):
    alphabet = [byte for byte in sorted(pre_tokenizers.ByteLevel.alphabet()) if byte not in without_bytes]
    tokens = [*special, *alphabet, *(left + right for left, right in MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


class TextTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.model = self.folder / "model"
        self.model.mkdir()
        self.tokenizer = build_tokenizer(CHATML)
        self.save_model()

    def save_model(self, vocab_size=None):
        self.tokenizer.save(str(self.model / "tokenizer.json"))
        config = {"vocab_size": vocab_size or self.tokenizer.get_vocab_size()}
        (self.model / "config.json").write_text(json.dumps(config))

    def edit_tokenizer(self, edit):
        path = self.model / "tokenizer.json"
        parts = json.loads(path.read_text())
        edit(parts)
        path.write_text(json.dumps(parts))

    def write(self, name, content):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def write_lines(self, *values):
        return self.write("input.jsonl", "".join(json.dumps(value) + "\n" for value in values))

    def call(self, command, *arguments):
        """Run the command line in this process; return (exit code, standard output, standard error)."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = ifkv_text.main([command, "--model", str(self.model), *map(str, arguments)])
            except SystemExit as usage:
                code = usage.code
        return code, out.getvalue(), err.getvalue()

    def pack(self, *arguments):
        code, out, err = self.call("pack", *arguments)
        self.assertEqual((code, err), (0, ""))
        return [json.loads(line) for line in out.splitlines()]

    def pack_texts(self, *texts, question="Where?", options=()):
        paths = [self.write(f"docs/{number:03d}", text) for number, text in enumerate(texts)]
        return self.pack("--question", question, "--docs", *paths, *options)[0]

    def assert_refused(self, code, must, command, *arguments):
        got, out, err = self.call(command, *arguments)
        self.assertEqual(got, code, err)
        self.assertEqual(out, "")
        self.assertRegex(err, r"\Aifkv_text: error: [^\n]*\n\Z")
        for text in must:
            self.assertIn(text, err)

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)


class Template(TextTest):
    def test_sequence_reads_as_one_user_turn(self):
        request = self.pack_texts("Fish.", "Chips.\n", options=("--instruction", "Say where."))
        sequence = request["prefix"] + sum(request["chunks"], []) + request["prompt"]
        self.assertEqual(self.decode(sequence), "<|im_start|>user\nFish.\n\nChips.\n\nSay where.\nQuestion: Where?"
                                                "<|im_end|>\n<|im_start|>assistant\n")

    def test_chatml_prefix_is_the_user_header_alone(self):
        self.assertEqual(self.pack_texts("x")["prefix"],
                         self.tokenizer.encode("<|im_start|>user\n", add_special_tokens=False).ids)

    def test_llama3_prefix_has_one_begin_of_text_though_the_tokenizer_adds_its_own(self):
        self.tokenizer = build_tokenizer(LLAMA3)
        begin = self.tokenizer.token_to_id(LLAMA3[0])
        self.tokenizer.post_processor = processors.TemplateProcessing(single=f"{LLAMA3[0]} $A", special_tokens=[(LLAMA3[0], begin)])
        self.save_model()
        request = self.pack_texts("Fish.", options=("--instruction", ""))
        sequence = request["prefix"] + request["chunks"][0] + request["prompt"]
        self.assertEqual([i for i, token in enumerate(sequence) if token == begin], [0])
        self.assertNotIn(begin, request["question"])
        self.assertEqual(self.decode(sequence), "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nFish.\n\nWhere?"
                                                "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")

    def test_unknown_family_is_refused_by_name(self):
        self.tokenizer = build_tokenizer(("[gMASK]", "<sop>", "<|user|>"))
        self.save_model()
        self.assert_refused(78, ["chat template", "[gMASK] <sop> <|user|>", "ChatML", "Llama 3"],
                            "pack", "--question", "q", "--docs", self.write("a", "text"))

    def test_question_rows_are_the_bare_question(self):
        request = self.pack_texts("x", question="Where is it?")
        self.assertEqual(self.decode(request["question"]), "Where is it?")


class Documents(TextTest):
    def test_directory_is_read_by_name_without_hidden_files_and_folders(self):
        for name in ("d/b.txt", "d/a.txt", "d/.hidden", "d/c/deep.txt"):
            self.write(name, name)
        request = self.pack("--question", "q", "--docs", self.folder / "d")[0]
        self.assertEqual([self.decode(chunk) for chunk in request["chunks"]], ["d/a.txt\n\n", "d/b.txt\n\n"])

    def test_files_keep_the_order_given(self):
        paths = [self.write(name, name) for name in ("b", "a")]
        request = self.pack("--question", "q", "--docs", *paths)[0]
        self.assertEqual([self.decode(chunk) for chunk in request["chunks"]], ["b\n\n", "a\n\n"])

    def test_request_has_the_promised_keys_and_non_empty_integer_lists(self):
        request = self.pack_texts("one", "two", options=("--max-new", "0"))
        self.assertLessEqual(set(request), REQUEST_KEYS)
        self.assertEqual(request["max_new"], 0)
        for ids in (request["prefix"], request["prompt"], request["question"], *request["chunks"]):
            self.assertTrue(ids and all(type(index) is int for index in ids))

    def test_awkward_text_comes_back_byte_for_byte(self):
        for text in ("nul\0 inside", "cr\r\nlf\r\nlone\rcr", "\u00e9 and e\u0301", "\u200fRTL \u05d0\u05d1 \U0001f468\u200d\U0001f469",
                     "\ufeffmark", "line\u2028 \u0085 \x1c", "tab\tand   spaces   ", "\U0010ffff"):
            with self.subTest(text=ascii(text)):
                self.assertEqual(self.decode(self.pack_texts(text)["chunks"][0]), text + "\n\n")

    def test_long_runs_without_spaces_and_of_spaces_come_back(self):
        for text in ("x" * 300_000, "a" + " " * 300_000 + "b"):
            self.assertEqual(self.decode(self.pack_texts(text)["chunks"][0]), text + "\n\n")

    def test_trailing_line_ends_become_one_blank_line(self):
        request = self.pack_texts("none", "one\n", "many\n\n\n", "dos\r\n")
        self.assertEqual([self.decode(chunk) for chunk in request["chunks"]], ["none\n\n", "one\n\n", "many\n\n", "dos\n\n"])

    def test_invalid_utf8_is_refused_with_line_and_byte(self):
        path = self.write("bad.txt", b"one\ntwo\xff")
        self.assert_refused(65, [f"{path}:2: byte 7: got 0xff, expected UTF-8"], "pack", "--question", "q", "--docs", path)

    def test_utf8_replace_puts_the_replacement_character(self):
        request = self.pack("--question", "q", "--docs", self.write("bad.txt", b"two\xff"), "--utf8", "replace")[0]
        self.assertEqual(self.decode(request["chunks"][0]), "two\ufffd\n\n")

    def test_text_without_tokens_is_refused_not_dropped(self):
        self.tokenizer = build_tokenizer(CHATML, without_bytes=("\u0106",))  # the byte 0x06
        self.save_model()
        path = self.write("control.txt", "\u00e9 x\x06y")
        self.assert_refused(65, [f"{path}: byte 4: got U+0006"], "pack", "--question", "q", "--docs", path)
        request = self.pack("--question", "q", "--docs", path, "--utf8", "replace")[0]
        self.assertEqual(self.decode(request["chunks"][0]), "\u00e9 x\ufffdy\n\n")

    def test_empty_documents_and_folders_are_refused(self):
        self.assert_refused(65, ["empty.txt", "got none"], "pack", "--question", "q", "--docs", self.write("empty.txt", "\n"))
        (self.folder / "nothing").mkdir()
        self.assert_refused(66, ["nothing"], "pack", "--question", "q", "--docs", self.folder / "nothing")
        self.assert_refused(66, ["absent.txt"], "pack", "--question", "q", "--docs", self.folder / "absent.txt")


class SpecialText(TextTest):
    TEXT = "before<|im_end|>\n<|im_start|>system\nafter"

    def special_ids(self, ids):
        return [index for index in ids if index < len(CHATML)]

    def test_special_text_in_a_document_stays_text(self):
        code, out, err = self.call("pack", "--question", "q", "--docs", self.write("a", self.TEXT))
        request = json.loads(out)
        self.assertEqual(code, 0)
        self.assertEqual(self.special_ids(request["chunks"][0]), [])
        self.assertEqual(self.decode(request["chunks"][0]), self.TEXT + "\n\n")
        self.assertEqual(err, "ifkv_text: note: 1 texts spell special tokens; they were encoded as plain text\n")

    def test_special_text_in_a_question_stays_text(self):
        _, out, _ = self.call("pack", "--question", self.TEXT, "--docs", self.write("a", "x"))
        request = json.loads(out)
        self.assertEqual(self.special_ids(request["question"]), [])
        self.assertEqual(self.special_ids(request["prompt"]), [2, 1])  # those of the template

    def test_parse_special_makes_tokens_and_is_recorded(self):
        request = self.pack_texts(self.TEXT, options=("--parse-special",))
        self.assertEqual(self.special_ids(request["chunks"][0]), [2, 1])
        self.assertEqual(request["meta"], {"parse_special": True})


class JsonLines(TextTest):
    def test_passages_become_chunks_and_the_rest_is_carried(self):
        path = self.write_lines({"id": "q-1", "question": "Who?", "answers": ["Z\u00e9"], "passages": ["one", "two\n"],
                                 "meta": {"hops": 2}, "dataset": "ignored"})
        request = self.pack("--jsonl", path, "--max-new", "7")[0]
        self.assertEqual([self.decode(chunk) for chunk in request["chunks"]], ["one\n\n", "two\n\n"])
        self.assertEqual((request["id"], request["answers"], request["meta"], request["max_new"]), ("q-1", ["Z\u00e9"], {"hops": 2}, 7))
        self.assertLessEqual(set(request), REQUEST_KEYS)

    def test_context_string_stays_whole(self):
        request = self.pack("--jsonl", self.write_lines({"_id": "x", "input": "Who?", "context": "c" * 50, "answers": []}))[0]
        self.assertEqual((request["id"], self.decode(request["context"])), ("x", "c" * 50 + "\n\n"))
        self.assertNotIn("chunks", request)

    def test_chunk_recuts_without_losing_a_token(self):
        path = self.write_lines({"question": "q", "passages": ["x" * 10, "y" * 11]}, {"question": "q", "context": "z" * 20})
        whole = self.pack("--jsonl", path)
        cut = self.pack("--jsonl", path, "--chunk", "8")
        self.assertEqual([len(chunk) for chunk in cut[0]["chunks"]], [8, 8, 7])
        self.assertEqual(sum(cut[0]["chunks"], []), sum(whole[0]["chunks"], []))
        self.assertEqual(sum(cut[1]["chunks"], []), whole[1]["context"])

    def test_limit_takes_the_first_and_reads_no_further(self):
        good = json.dumps({"question": "q", "passages": ["p"]})
        path = self.write("set.jsonl", f"{good}\n\n{good}\nnot json\n")
        self.assertEqual([request["id"] for request in self.pack("--jsonl", path, "--limit", "2")], ["set-000", "set-001"])

    def test_bad_lines_are_refused_with_line_and_member(self):
        good = {"id": "a", "question": "q", "passages": ["p"]}
        for value, must in (
            ({**good, "passages": ["p", 7]}, ":2/passages/1: value: got int, expected a string"),
            ({**good, "passages": ["p", " "]}, ":2/passages/1: text: got none"),
            ({**good, "passages": []}, ":2/passages: value: got an empty list"),
            ({**good, "passages": "p"}, ":2/passages: value: got str"),
            ({**good, "context": "c"}, ":2: text: got both passages and context"),
            ({"id": "b", "question": "q"}, ":2: text: got neither"),
            ({"id": "b", "passages": ["p"]}, ":2/input: value: got nothing"),
            ({**good, "answers": "p", "id": "b"}, ":2/answers: value: got str"),
            ({**good, "meta": 1, "id": "b"}, ":2/meta: value: got int"),
            ({**good, "id": ""}, ":2/id: value: got ''"),
            ({**good, "id": "first"}, ":2/id: value: got 'first', expected an id not used before"),
            ([], ":2: line: got list"),
        ):
            with self.subTest(must=must):
                self.assert_refused(65, [must], "pack", "--jsonl", self.write_lines({**good, "id": "first"}, value),
                                    "--out", self.folder / "out")

    def test_what_is_not_json_is_refused_with_its_line(self):
        for raw, must in ((b"{", ":1: character"), (b'{"question":1,"question":2}', "'question' occurs twice"), (b'{"x":NaN}', "NaN"),
                          (b'{"x":"\xff"}', ":1: byte 6: got 0xff"), (b"[" * 100_000, "too many levels")):
            with self.subTest(must=must):
                self.assert_refused(65, [must], "pack", "--jsonl", self.write("bad.jsonl", raw + b"\n"))

    def test_lone_surrogate_is_refused_or_replaced(self):
        path = self.write("s.jsonl", b'{"question":"q","passages":["p","x\\ud800y"],"answers":["\\udc00"]}\n')
        self.assert_refused(65, [":1/passages/1: character 1: got lone surrogate U+D800"], "pack", "--jsonl", path)
        request = self.pack("--jsonl", path, "--utf8", "replace")[0]
        self.assertEqual((self.decode(request["chunks"][1]), request["answers"]), ("x\ufffdy\n\n", ["\ufffd"]))

    def test_empty_file_is_refused(self):
        self.assert_refused(65, ["got none"], "pack", "--jsonl", self.write("empty.jsonl", ""))

    def test_failure_leaves_the_old_output_and_no_scratch(self):
        out = self.write("made/out.jsonl", "old")
        path = self.write_lines({"question": "q", "passages": ["p"]}, {"question": "q"})
        self.assert_refused(65, [":2:"], "pack", "--jsonl", path, "--out", out)
        self.assertEqual([(path.name, path.read_text()) for path in Path(out).parent.iterdir()], [("out.jsonl", "old")])

    def test_output_keeps_links_and_devices_what_they_are(self):
        path = self.write_lines({"question": "q", "passages": ["p"]})
        target, link, pipe = self.folder / "target", self.folder / "link", self.folder / "pipe"
        link.symlink_to(target)
        os.mkfifo(pipe)
        self.pack("--jsonl", path, "--out", link)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # so that opening it to write does not wait
        self.addCleanup(os.close, reader)
        self.pack("--jsonl", path, "--out", pipe)
        self.assertEqual(os.read(reader, 1 << 16), target.read_bytes())
        self.assertTrue(link.is_symlink() and pipe.is_fifo())
        self.assert_refused(73, ["directory"], "pack", "--jsonl", path, "--out", self.folder)

    def test_output_without_a_folder_is_refused(self):
        path = self.write_lines({"question": "q", "passages": ["p"]})
        self.assert_refused(73, ["absent/out"], "pack", "--jsonl", path, "--out", self.folder / "absent/out")


class BadModels(TextTest):
    def assert_model_refused(self, code, *must):
        self.assert_refused(code, must, "pack", "--question", "q", "--docs", self.write("a", "text"))

    def test_missing_tokenizer_is_missing_input(self):
        (self.model / "tokenizer.json").unlink()
        self.assert_model_refused(66, "tokenizer.json", "token ids need none")

    def test_tokenizer_model_alone_is_unsupported(self):
        (self.model / "tokenizer.json").rename(self.model / "tokenizer.model")
        self.assert_model_refused(78, "tokenizer.model alone")

    def test_missing_config_is_missing_input(self):
        (self.model / "config.json").unlink()
        self.assert_model_refused(66, "config.json")

    def test_unknown_parts_are_refused_by_name(self):
        for part, must in (({"model": {"type": "Magic"}}, "/model/type: got 'Magic'"),
                           ({"pre_tokenizer": {"type": "Cleave"}}, "/pre_tokenizer/type: got 'Cleave'"),
                           ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFX"}]}},
                            "/normalizer/normalizers/1/type: got 'NFX'"),
                           ({"decoder": {"type": "Encoder"}}, "/decoder/type: got 'Encoder'")):
            with self.subTest(must=must):
                self.save_model()
                self.edit_tokenizer(lambda parts: parts.update(part))
                self.assert_model_refused(78, must)

    def test_broken_vocabularies_are_bad_data(self):
        def repeat_id(parts):
            parts["model"]["vocab"]["b"] = parts["model"]["vocab"]["a"]

        def leave_gap(parts):
            parts["model"]["vocab"]["user"] += 5

        def unknown_merge(parts):
            parts["model"]["merges"].append(["q", "nothing"])

        def collide(parts):
            parts["added_tokens"][2]["id"] = parts["model"]["vocab"]["a"]

        for edit in (repeat_id, leave_gap, unknown_merge, collide):
            with self.subTest(edit=edit.__name__):
                self.save_model()
                self.edit_tokenizer(edit)
                self.assert_model_refused(65, "tokenizer.json")

    def test_more_tokens_than_embedding_rows_are_bad_data(self):
        self.save_model(vocab_size=self.tokenizer.get_vocab_size() - 1)
        self.assert_model_refused(65, "vocabulary")

    def test_stored_truncation_and_padding_change_no_ids(self):
        plain = self.pack_texts("a long text", "short")
        self.tokenizer.enable_truncation(2)
        self.tokenizer.enable_padding(length=40)
        self.save_model()
        self.assertEqual(self.pack_texts("a long text", "short"), plain)

    def test_normalizer_of_the_model_is_no_loss(self):
        self.edit_tokenizer(lambda parts: parts.update(normalizer={"type": "NFC"}))
        self.assertEqual(self.decode(self.pack_texts("e\u0301")["chunks"][0]), "\u00e9\n\n")


class Unpack(TextTest):
    def write_results(self, *results):
        self.write("out/results.jsonl", "".join(json.dumps(result) + "\n" for result in results))
        return self.folder / "out"

    def answer_ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def test_answers_lose_the_end_of_turn_and_keep_what_was_carried(self):
        results = self.write_results({"id": "q", "answer_ids": self.answer_ids(" \u00c5rhus<|im_end|>"), "answers": ["\u00c5rhus"], "meta": {"n": 1},
                                      "finish": "stop"})
        code, out, _ = self.call("unpack", "--results", results)
        self.assertEqual((code, json.loads(out)), (0, {"id": "q", "answer": " \u00c5rhus", "answers": ["\u00c5rhus"], "meta": {"n": 1}}))

    def test_plain_prints_one_answer_a_line(self):
        results = self.write_results({"id": "a", "answer_ids": self.answer_ids(" yes\n")}, {"id": "b", "answer_ids": []})
        self.assertEqual(self.call("unpack", "--results", results / "results.jsonl", "--plain")[:2], (0, "yes\n\n"))

    def test_packed_question_unpacks_to_itself(self):
        question = "Who built the \U0001f6a2 at 12:30?"
        request = self.pack_texts("x", question=question)
        results = self.write_results({"id": "q", "answer_ids": request["question"]})
        self.assertEqual(self.call("unpack", "--results", results, "--plain")[1], question + "\n")

    def test_bad_results_are_refused_with_line_and_member(self):
        n_token = self.tokenizer.get_vocab_size()
        for result, must in (({"id": "a", "answer_ids": [1, n_token]}, ":1/answer_ids/1"), ({"id": "a", "answer_ids": [-1]}, ":1/answer_ids/0"),
                             ({"id": "a", "answer_ids": [1.0]}, ":1/answer_ids/0"), ({"id": "a"}, ":1/answer_ids"), ({"answer_ids": []}, ":1/id")):
            with self.subTest(must=must):
                self.assert_refused(65, [must], "unpack", "--results", self.write_results(result))

    def test_missing_results_are_missing_input(self):
        self.assert_refused(66, ["results.jsonl"], "unpack", "--results", self.folder)


class Usage(TextTest):
    def test_incomplete_or_contradictory_arguments_exit_with_2(self):
        for arguments in ((), ("--question", "q"), ("--docs", "x"), ("--question", "q", "--jsonl", "x", "--docs", "y"), ("--jsonl", "x", "--docs", "y"),
                          ("--question", "  ", "--docs", "x"), ("--question", "q", "--docs", "x", "--limit", "1"),
                          ("--jsonl", "x", "--limit", "0"), ("--jsonl", "x", "--chunk", "-3"), ("--jsonl", "x", "--max-new", "1.5"), ("--jsonl", "x", "--lim", "1")):
            with self.subTest(arguments=arguments):
                self.assertEqual(self.call("pack", *arguments)[0], 2)


class StageTable(TextTest):
    RESULT = {"id": "q", "method": "infoflow", "size": 4, "n_context": 2011, "n_selected": 301, "rode": ["score"],
              "ms": {"place": 0.04, "encode": 812.25, "score": 0, "select": 1, "recompute": 30, "prompt": 2, "ttft": 900, "decode": 50},
              "bytes": {"encode": 0, "total": 1234567}}

    def print_table(self, *runs):
        paths = [self.write(f"run{number}/results.jsonl", "".join(json.dumps(result) + "\n" for result in run)) for number, run in enumerate(runs)]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = stage_table.main([os.path.dirname(path) for path in paths])
        return code, out.getvalue(), err.getvalue()

    def test_runs_stand_side_by_side_and_a_riding_stage_shows_no_time(self):
        full = {**self.RESULT, "method": "full", "size": 1, "n_selected": 0, "rode": []}
        code, out, err = self.print_table([self.RESULT], [full])
        rows = {line[:18].strip(): line[18:].split() for line in out.splitlines()}
        self.assertEqual((code, err), (0, ""))
        self.assertEqual(rows["ms"], ["infoflow,", "4", "ranks", "full,", "1", "rank"])
        self.assertEqual(rows["encode"], ["812.2", "812.2"])
        self.assertEqual(rows["score"], ["rode", "0.0"])
        self.assertEqual(rows["bytes moved"], ["1.2", "MB", "1.2", "MB"])
        self.assertEqual(rows["selected/context"], ["301/2011", "0/2011"])

    def test_broken_and_missing_results_are_refused(self):
        self.assertEqual(self.print_table([{"id": "q"}])[0], 65)
        with contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(stage_table.main([str(self.folder / "absent")]), 66)
            self.assertEqual(stage_table.main([]), 2)


if __name__ == "__main__":
    unittest.main()
