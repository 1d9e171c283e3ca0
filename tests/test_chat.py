"""The conversation: its commands, what it remembers, and that the base side is the base."""

import io
import json

import pytest
import torch
from rich.console import Console

from deltatune.commands.chat import COMMANDS, Chat, Reply, Voice, opener, speaker
from models import enliven, tiny
from tiny_tokenizers import CHATML, byte_level


def talk(**settings) -> tuple[Chat, list]:
    """A chat whose model answers with what it was asked and how; and the list of those calls."""
    calls: list = []

    def speak(messages, adapter, temperature, show):
        calls.append((list(messages), adapter, temperature))
        text = f"{'tuned' if adapter else 'base'} #{len(messages)} \x1b[31m[bold]"
        show(text[:9])
        show(text[9:])
        return Reply(text, 5, 2.0)

    screen = Console(file=io.StringIO(), width=100, force_terminal=False)
    return Chat(speak, screen, **settings), calls


def said(chat: Chat) -> str:
    """What was shown since the last look."""
    text = chat.console.file.getvalue()
    chat.console.file.seek(0)
    chat.console.file.truncate()
    return text


def test_a_message_is_answered_remembered_and_harmless():
    chat, calls = talk(system="be kind")
    assert chat.handle("hello")
    assert said(chat) == "base #2 ␛[31m[bold]\n"
    chat.handle("more")
    assert [m["role"] for m in calls[1][0]] == ["system", "user", "assistant", "user"]
    chat.handle("/undo")
    assert "1 exchanges are left" in said(chat)
    assert len(chat.turns) == 2


LINES = [
    ("/hlep", "unknown command /hlep (did you mean '/help'?)"),
    ("/undo", "nothing to undo"),
    ("/temp hot", "'hot': give a temperature from 0"),
    ("/temp nan", "'nan': give a temperature from 0"),
    ("/temp 9", "give a temperature"),
    ("/temp 0.7", "temperature 0.7"),
    ("/adapter on", "there is no adapter"),
    ("/adapter", "adapter off"),
    ("/adapter x", "no other adapter can be opened here"),
    ("/compare hi", "there is no adapter to compare with"),
    ("/tokens", "nothing was generated yet"),
    ("/save", "say where: /save FILE.jsonl"),
    ("/save x.jsonl", "nothing to save yet"),
    ("/system be brief", "system message set"),
    ("/help", "/compare [TEXT]"),
]


@pytest.mark.parametrize(("line", "answer"), LINES)
def test_a_command_says_what_it_did_or_why_not(line, answer):
    chat, calls = talk()
    assert chat.handle(line)
    assert answer in said(chat)
    assert calls == []


def test_compare_asks_both_and_keeps_nothing():
    chat, calls = talk(has_adapter=True, adapter=True)
    chat.handle("/compare")
    assert "nothing was asked yet" in said(chat)
    chat.handle("one")
    chat.handle("/compare")
    chat.handle("/compare two")
    text = said(chat)
    assert "base #1" in text
    assert "tuned #3" in text
    assert [(len(messages), adapter) for messages, adapter, _ in calls] == [
        (1, True), (1, False), (1, True), (3, False), (3, True),
    ]  # fmt: skip
    assert len(chat.turns) == 2


def test_a_saved_conversation_is_a_training_row(tmp_path):
    chat, _ = talk(system="be kind")
    chat.handle("hello")
    chat.handle("/tokens")
    assert "5 tokens in 2.0 s (2.5 tokens/s)" in said(chat)
    for _ in range(2):
        chat.handle(f"/save {tmp_path / 'talk.jsonl'}")
    rows = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert [m["role"] for m in rows[0]["messages"]] == ["system", "user", "assistant"]
    assert "cannot" not in said(chat)
    assert chat.handle(f"/save {tmp_path}")  # a folder: an error is said, the conversation goes on
    assert "directory" in said(chat).lower()


def test_an_interrupted_or_refused_answer_is_not_kept():
    def stop(*_):
        raise KeyboardInterrupt

    def refuse(*_):
        raise ValueError("prompt 0 is too long")

    for speak, text in ((stop, "interrupted"), (refuse, "too long")):
        chat, _ = talk()
        chat.speak = speak
        assert chat.handle("hello")
        assert text in said(chat)
        assert chat.turns == []


def test_quit_ends_and_every_command_has_help():
    chat, _ = talk()
    assert not chat.handle("/quit")
    assert all(str(action.__doc__).startswith(word) for word, action in COMMANDS.items())


def test_the_base_side_is_the_base_and_another_adapter_can_be_opened(tmp_path):
    from deltatune.core.attach import attach, attached, detach, trainable
    from deltatune.core.store import save
    from deltatune.evaluate.generate import Decoding, answers
    from deltatune.methods.lora import LoRA

    tokenizer = byte_level(CHATML)
    model = tiny("llama", max_position_embeddings=512)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    enliven(model)
    asked = [{"role": "user", "content": "hi"}]
    base = speaker(model, tokenizer, Voice(8))(asked, False, 0.0, print)
    attach(model, LoRA(r=4, targets=("all",)))
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    save(model, "default", tmp_path / "adapter")
    speak = speaker(model, tokenizer, Voice(8))
    pieces: list[str] = []
    tuned = speak(asked, True, 0.0, pieces.append)
    assert len(pieces) > 1  # as they are made
    assert "".join(pieces) == tuned.text == answers(model, tokenizer, [asked], Decoding(8)).texts[0]
    assert speak(asked, False, 0.0, print).text == base.text
    model.deltatune_state.records["default"] = {"plain": True}  # trained on plain prompts: asked with them
    assert speak(asked, True, 0.0, print).text == answers(model, tokenizer, ["hi"], Decoding(8)).texts[0] != tuned.text
    assert speak(asked, False, 0.0, print).text == base.text
    model.deltatune_state.records.clear()
    assert tuned.text != base.text
    detach(model, "default")
    for _ in range(2):  # the second time another adapter is there
        opener(model, None)(tmp_path)
        assert len(attached(model)) == 1
        assert speak(asked, True, 0.0, print).text == tuned.text
    with pytest.raises(ValueError, match="no such adapter folder"):
        opener(model, None)(tmp_path / "none")
    assert len(attached(model)) == 1
