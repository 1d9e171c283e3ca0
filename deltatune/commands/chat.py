"""`deltatune chat`: talk to a model, and see base and adapter side by side."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deltatune.commands.adapted import Adapter, Combine, Draws, Longest, Model, SoftPrompt, Task, opened, told
from deltatune.commands.shell import main, screen
from deltatune.marks import nearest
from deltatune.terminal import plain

Message = dict[str, str]


@dataclass(frozen=True)
class Reply:
    """What the model said, with its cost."""

    text: str
    tokens: int
    seconds: float


Show = Callable[[str], None]
Speaker = Callable[[Sequence[Message], bool, float, Show], Reply]  # messages, adapter on?, temperature, pieces -> reply


@dataclass
class Chat:
    """A conversation and its slash commands; `speak` answers, `open_adapter` replaces the adapter."""

    speak: Speaker
    console: Console
    open_adapter: Callable[[Path], None] | None = None
    has_adapter: bool = False
    adapter: bool = False
    temperature: float = 0.0
    system: str = ""
    turns: list[Message] = field(default_factory=list)
    last: Reply | None = None

    def handle(self, line: str) -> bool:
        """One line of input: a message or a /command. False ends the conversation."""
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/"):
            self.say(line)
            return True
        word, _, rest = line.partition(" ")
        action = COMMANDS.get(word)
        if action is None:
            self.tell(f"unknown command {word}{nearest(word, COMMANDS)}; /help lists them")
            return True
        try:
            return action(self, rest.strip()) is not False
        except (ValueError, OSError) as error:
            self.tell(str(error))
            return True

    def tell(self, text: str) -> None:
        """A remark of the program, not of the model."""
        self.console.print(plain(text), markup=False, style="dim", soft_wrap=True)

    def messages(self, *more: Message) -> list[Message]:
        """The conversation as the model sees it."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns, *more]

    def say(self, text: str) -> None:
        """Ask, show the answer, keep both; after an error or Ctrl-C neither is kept."""
        asked = {"role": "user", "content": text}
        try:
            self.last = self.speak(self.messages(asked), self.adapter, self.temperature, self.show)
        except KeyboardInterrupt:
            self.console.print()
            self.tell("interrupted; the message was not kept")
            return
        except ValueError as error:
            self.tell(f"{error}")
            return
        self.turns += [asked, {"role": "assistant", "content": self.last.text}]
        self.console.print()

    def show(self, piece: str) -> None:
        """A piece of the answer, as soon as it is made."""
        self.console.print(plain(piece), markup=False, soft_wrap=True, end="")
        self.console.file.flush()

    def set_system(self, text: str) -> None:
        """/system [TEXT]"""
        self.system = text
        self.tell("system message set" if text else "system message cleared")

    def set_temperature(self, text: str) -> None:
        """/temp [NUMBER]"""
        if text:
            value = float(text) if text.replace(".", "", 1).isdigit() else -1.0
            if not 0 <= value <= 5:
                raise ValueError(f"{text!r}: give a temperature from 0 (the likeliest token) to 5")
            self.temperature = value
        self.tell(f"temperature {self.temperature:g}")

    def set_adapter(self, text: str) -> None:
        """/adapter [on|off|DIR]"""
        if text not in ("", "on", "off"):
            if self.open_adapter is None:
                raise ValueError("no other adapter can be opened here")
            self.open_adapter(Path(text))
            self.has_adapter = self.adapter = True
        elif text == "on" and not self.has_adapter:
            raise ValueError("there is no adapter; start with --adapter DIR or say /adapter DIR")
        elif text:
            self.adapter = text == "on"
        self.tell(f"adapter {'on' if self.adapter else 'off'}")

    def compare(self, text: str) -> None:
        """/compare [TEXT]"""
        if not self.has_adapter:
            raise ValueError("there is no adapter to compare with; start with --adapter DIR")
        asked = self.messages({"role": "user", "content": text}) if text else self.messages()
        while asked and asked[-1]["role"] == "assistant":
            asked.pop()
        if not asked or asked[-1]["role"] != "user":
            raise ValueError("nothing was asked yet; say /compare TEXT")
        table = Table(expand=True)
        table.add_column("base", ratio=1, overflow="fold")
        table.add_column("adapter", ratio=1, overflow="fold")
        base, tuned = (self.speak(asked, on, self.temperature, lambda piece: None) for on in (False, True))
        table.add_row(Text(plain(base.text)), Text(plain(tuned.text)))
        self.console.print(table)

    def undo(self, text: str) -> None:
        """/undo"""
        if not self.turns:
            raise ValueError("nothing to undo")
        del self.turns[-2:]
        self.tell(f"undone; {len(self.turns) // 2} exchanges are left")

    def save(self, text: str) -> None:
        """/save FILE.jsonl"""
        if not text:
            raise ValueError("say where: /save FILE.jsonl (one line is added, a row `deltatune train` can read)")
        if not self.turns:
            raise ValueError("nothing to save yet")
        with open(text, "a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": self.messages()}) + "\n")
        self.tell(f"added to {text}")

    def tokens(self, text: str) -> None:
        """/tokens"""
        if self.last is None:
            raise ValueError("nothing was generated yet")
        speed = self.last.tokens / self.last.seconds if self.last.seconds else 0.0
        self.tell(f"last answer: {self.last.tokens} tokens in {self.last.seconds:.1f} s ({speed:.1f} tokens/s)")

    def help(self, text: str) -> None:
        """/help"""
        self.tell("\n".join(str(action.__doc__) for action in COMMANDS.values()))

    def quit(self, text: str) -> bool:
        """/quit"""
        return False


COMMANDS: dict[str, Callable[[Chat, str], bool | None]] = {
    "/system": Chat.set_system,
    "/temp": Chat.set_temperature,
    "/adapter": Chat.set_adapter,
    "/compare": Chat.compare,
    "/undo": Chat.undo,
    "/save": Chat.save,
    "/tokens": Chat.tokens,
    "/help": Chat.help,
    "/quit": Chat.quit,
}


@dataclass(frozen=True)
class Voice:
    """How a model answers: its longest answer, the seed, and which soft prompts."""

    max_new_tokens: int
    seed: int = 0
    prompt: int | None = None  # of several soft prompts
    task: str | None = None
    combine: str | None = None


def speaker(model: Any, tokenizer: Any, voice: Voice) -> Speaker:
    """Answers of a loaded model; without its adapter it is exactly the base."""
    from deltatune.core.attach import attached, disabled
    from deltatune.evaluate.asking import plain as plain_prompts
    from deltatune.evaluate.generate import Decoding, answers, stream

    def speak(messages: Sequence[Message], adapter: bool, temperature: float, show: Show) -> Reply:
        seed = voice.seed + len(messages)
        decoding = Decoding(voice.max_new_tokens, temperature, seed=seed)
        if adapter:
            decoding = replace(decoding, prompt=voice.prompt, task=voice.task, combine=voice.combine)
        prompt: Any = list(messages)
        if adapter and plain_prompts(model):
            prompt = messages[-1]["content"]
        elif not getattr(tokenizer, "chat_template", None):
            prompt = "\n".join(message["content"] for message in messages)
        with nullcontext() if adapter or not attached(model) else disabled(model):
            if model.config.is_encoder_decoder:
                found = answers(model, tokenizer, [prompt], decoding)
                show(found.texts[0])
                return Reply(found.texts[0], found.tokens, found.seconds)
            text, began = "", time.perf_counter()
            made: Any = stream(model, tokenizer, prompt, decoding)
            with closing(made):
                for piece in made:
                    show(piece)
                    text += piece
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        return Reply(text, tokens, time.perf_counter() - began)

    return speak


def opener(model: Any, tokenizer: Any) -> Callable[[Path], None]:
    """Replace the attached adapters by the one of another folder; a folder that does not fit changes nothing."""

    def open_adapter(folder: Path) -> None:
        from deltatune.core.attach import attached, detach
        from deltatune.core.store import load

        if not folder.is_dir():
            raise ValueError(f"{folder}: there is no such adapter folder")
        before = attached(model)
        name = next(name for name in ("chat", "chat_") if name not in before)
        load(model, folder / "adapter" if (folder / "adapter").is_dir() else folder, name, tokenizer=tokenizer)
        for old in before:
            detach(model, old)

    return open_adapter


def lines(console: Console) -> Iterator[str]:
    """What the user types, with line editing on a terminal; piped input as it comes."""
    terminal = sys.stdin.isatty()
    if terminal:
        from contextlib import suppress

        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() history and editing
    while True:
        try:
            yield input("> " if terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("/quit or Ctrl-D ends the conversation", style="dim")


@contextmanager
def quiet() -> Iterator[None]:
    """Progress bars and advice of libraries do not belong between the turns of a conversation."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@main.command()
def chat(
    model: Model = None,
    adapter: Adapter = None,
    max_new_tokens: Longest = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=5.0, help="0 takes the likeliest token.")] = 0.0,
    system: Annotated[str, typer.Option(help="A system message.")] = "",
    seed: Draws = 0,
    soft_prompt: SoftPrompt = None,
    task: Task = None,
    combine: Combine = None,
) -> None:
    """Talk to a model; /compare shows base and adapter side by side, /help lists the commands."""
    told("chat", model, adapter)
    with quiet():
        loaded, tokenizer, record = opened(model, adapter)
        console, has = screen(), adapter is not None
        speak = speaker(loaded, tokenizer, Voice(max_new_tokens, seed, soft_prompt, task, combine))
        talk = Chat(speak, console, opener(loaded, tokenizer), has, has, temperature, system)
        if record.get("plain"):
            talk.tell("trained on plain prompts: your last message goes in as it is, without the chat template")
        talk.tell("/help lists the commands, /quit ends")
        for line in lines(console):
            if not talk.handle(line):
                break
