"""Both kinds of tokenizers behind the one interface, and the comparison of two."""

from __future__ import annotations

import json

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_opd.data.tokenizer import (
    TokenizerError,
    check_model_vocabulary,
    compare_tokenizers,
    load_tokenizer,
)
from tests.data.make_tokenizers import PLAIN_TEMPLATE, TEXT, make_hugging_face, make_sentencepiece

QUESTION = "Solve 12 + 3, step by step."


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    return make_hugging_face(tmp_path_factory.mktemp("hf"), generation_eos=[2, 0])


@pytest.fixture(scope="module")
def sp_folder(tmp_path_factory):
    return make_sentencepiece(tmp_path_factory.mktemp("sp"))


def test_hugging_face_ids_are_those_of_transformers(hf_folder):
    ours, theirs = load_tokenizer(hf_folder), AutoTokenizer.from_pretrained(hf_folder)
    assert ours.encode(QUESTION) == theirs(QUESTION).input_ids
    assert ours.decode([*ours.encode(QUESTION), 2]) == QUESTION  # the EOS does not show
    assert ours.vocab_size == len(theirs)
    assert ours.pieces()[2] == "<|im_end|>"
    assert ours.pad_id == 0


def test_sentencepiece_ids_are_those_of_the_library(sp_folder):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sp_folder / "tokenizer.model"))
    for ours in (load_tokenizer(sp_folder), load_tokenizer(str(sp_folder / "tokenizer.model"))):
        assert ours.encode(QUESTION) == processor.encode(QUESTION)
        assert ours.encode(QUESTION, start=True) == [3, *processor.encode(QUESTION)]
        assert ours.decode([*ours.encode(QUESTION), 1]) == QUESTION
        assert (ours.vocab_size, ours.bos_id, ours.pad_id, ours.eos_ids) == (80, 3, 0, {1})


def test_both_decode_what_they_encode(hf_folder, sp_folder):
    for tokenizer in map(load_tokenizer, (hf_folder, sp_folder)):
        for text in (*TEXT, "1 2  3"):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_eos_is_the_union_of_generation_config_and_tokenizer(tmp_path):
    both = load_tokenizer(make_hugging_face(tmp_path / "a", generation_eos=[0, 1]))
    assert both.eos_ids == {0, 1, 2}
    assert both.eos_source == "generation_config.json [0, 1] and tokenizer [2]"
    one = load_tokenizer(make_hugging_face(tmp_path / "b", generation_eos=0))
    assert one.eos_ids == {0, 2}
    folder = make_hugging_face(tmp_path / "c")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 0, "model_type": "qwen3"}))
    assert load_tokenizer(folder).eos_source == "config.json [0] and tokenizer [2]"


def test_bos_follows_the_tokenizers_own_convention(tmp_path):
    plain = load_tokenizer(make_hugging_face(tmp_path / "qwen"))
    assert plain.encode("1", start=True) == plain.encode("1")
    llama = load_tokenizer(make_hugging_face(tmp_path / "llama", bos="<s>", extra=("<s>",)))
    assert llama.encode("1", start=True) == [3, *llama.encode("1")]
    off = load_tokenizer(make_sentencepiece(tmp_path / "off", config={"bos_token_id": None}))
    assert off.encode("1", start=True) == off.encode("1")


def test_chat_template_with_and_without_thinking(hf_folder, sp_folder, tmp_path):
    tokenizer = load_tokenizer(hf_folder)
    messages = [{"role": "user", "content": "1+2?"}]
    assert tokenizer.chat(messages) == "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.chat(messages, thinking=True) == tokenizer.chat(messages)
    assert tokenizer.chat(messages, thinking=False).endswith("<think>\n\n</think>\n\n")
    plain = load_tokenizer(make_hugging_face(tmp_path, template=PLAIN_TEMPLATE))
    assert plain.chat(messages) == "<|im_start|>user: 1+2?<|im_end|>thinking:"
    with pytest.raises(TokenizerError, match="no thinking switch; set data.thinking: null"):
        plain.chat(messages, thinking=False)
    with pytest.raises(TokenizerError, match="no chat template; set data.template: none"):
        load_tokenizer(sp_folder).chat(messages)


def test_a_template_that_refuses_messages_says_so(tmp_path):
    folder = make_hugging_face(tmp_path, template="{{ raise_exception('no system role here') }}")
    with pytest.raises(TokenizerError, match="no system role here"):
        load_tokenizer(folder).chat([{"role": "user", "content": "1"}])


def test_bad_paths_and_files_are_named(tmp_path, sp_folder):
    with pytest.raises(TokenizerError, match="missing: no such file or directory"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(TokenizerError, match=r"found none of tokenizer.json, .*tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(TokenizerError, match="give the directory"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match=f"cannot load the tokenizer in {tmp_path}"):
        load_tokenizer(tmp_path)
    foreign = tmp_path / "x.model"
    foreign.write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's format, as Llama 3's original tokenizer.model
    with pytest.raises(TokenizerError, match="x.model is not a sentencepiece model"):
        load_tokenizer(foreign)


def test_bad_eos_is_named(tmp_path):
    folder = make_hugging_face(tmp_path / "a", generation_eos=[2, 9999])
    with pytest.raises(TokenizerError, match="generation_config.json: eos_token_id 9999 is beyond"):
        load_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": "two"}')
    with pytest.raises(TokenizerError, match="must be an id or a list of ids, not 'two'"):
        load_tokenizer(folder)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(TokenizerError, match="generation_config.json is not readable JSON"):
        load_tokenizer(folder)
    with pytest.raises(TokenizerError, match="names no end-of-response id"):
        load_tokenizer(make_hugging_face(tmp_path / "b", eos=None))


def test_code_in_the_directory_is_never_run(tmp_path):
    folder = make_hugging_face(tmp_path)
    marker = tmp_path / "ran"
    (folder / "tokenization_own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_own.Own", None]}
    config["tokenizer_class"] = "Own"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        load_tokenizer(folder)
    except TokenizerError:
        pass
    assert not marker.exists()


def test_equal_pieces_with_other_eos_and_template_pass_with_notes(tmp_path):
    student = load_tokenizer(make_hugging_face(tmp_path / "base", eos="<|endoftext|>", generation_eos=0))
    teacher = load_tokenizer(make_hugging_face(tmp_path / "chat", generation_eos=[2, 0], template=PLAIN_TEMPLATE))
    eos, template = compare_tokenizers(student, teacher)
    assert "student [0], teacher [0, 2]; responses end at the student's, from generation_config.json [0]" in eos
    assert "chat templates differ" in template
    assert compare_tokenizers(student, student) == []
    assert student.fingerprint() != teacher.fingerprint()
    assert student.fingerprint() == load_tokenizer(tmp_path / "base").fingerprint()


def test_the_first_difference_is_named(tmp_path, sp_folder):
    student = load_tokenizer(make_hugging_face(tmp_path / "a"))
    wider = load_tokenizer(make_hugging_face(tmp_path / "b"))
    wider.hf.add_tokens(["<new>"])
    wider.vocab_size += 1
    sizes = f"{student.vocab_size} and {wider.vocab_size}; the first id that only the teacher has is 290, '<new>'"
    with pytest.raises(TokenizerError, match=f"differ in size: {sizes}"):
        compare_tokenizers(student, wider)
    one = load_tokenizer(make_sentencepiece(tmp_path / "c", symbols="0123456789"))
    two = load_tokenizer(make_sentencepiece(tmp_path / "d", symbols="0123456798"))
    with pytest.raises(TokenizerError, match="differ first at id 12: '8' and '9'"):
        compare_tokenizers(one, two)
    assert compare_tokenizers(one, load_tokenizer(make_sentencepiece(tmp_path / "e"))) == []


def test_another_bos_for_the_same_pieces_is_refused(tmp_path):
    extra = ("<s>", "<t>")
    one = load_tokenizer(make_hugging_face(tmp_path / "a", bos="<s>", extra=extra))
    two = load_tokenizer(make_hugging_face(tmp_path / "b", bos="<t>", extra=extra))
    with pytest.raises(TokenizerError, match=r"BOS id: 3 \('<s>'\) and 4 \('<t>'\)"):
        compare_tokenizers(one, two)


def test_a_tokenizer_larger_than_the_embedding_is_refused(sp_folder):
    tokenizer = load_tokenizer(sp_folder)
    check_model_vocabulary(tokenizer, 80, "student")
    check_model_vocabulary(tokenizer, 128, "student")  # padded vocabularies are usual
    with pytest.raises(TokenizerError, match="has 80 ids, but student embeds only 79"):
        check_model_vocabulary(tokenizer, 79, "student")
