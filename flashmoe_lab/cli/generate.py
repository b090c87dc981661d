"""The command that writes text: generate."""

import argparse
import json
import resource
import sys
from dataclasses import asdict
from pathlib import Path

from flashmoe_lab.cli.options import Commands, add_k, add_model
from flashmoe_lab.cli.prompt import add_prompt, prompt_of
from flashmoe_lab.cli.terminal import follow
from flashmoe_lab.engine import load
from flashmoe_lab.generation import PREFILL_CHUNK
from flashmoe_lab.run import Run
from flashmoe_lab.storage.policy import POLICIES
from flashmoe_lab.storage.ways import READERS
from flashmoe_lab.weights import DTYPES


def _add_generate(commands: Commands) -> None:
    command = commands.add_parser("generate", help="generate text, with experts read from disk")
    add_model(command)
    add_prompt(command)
    command.add_argument("--max-tokens", type=int, default=128)
    add_k(command)
    command.add_argument("--bank-gb", type=float, help="memory for experts, in 10**9 bytes")
    command.add_argument("--resident", action="store_true", help="hold every expert in memory")
    command.add_argument("--reader", choices=list(READERS), default="pread")
    command.add_argument("--threads", type=int, default=8, help="reading threads")
    command.add_argument("--split", type=int, default=1, help="pieces that a block is read in")
    command.add_argument("--policy", choices=list(POLICIES), default="lru")
    command.add_argument("--dtype", choices=list(DTYPES), help="of activations")
    command.add_argument("--prefill-chunk", type=int, default=PREFILL_CHUNK)
    command.add_argument("--verify", action="store_true", help="check each block when first read")
    command.add_argument("--checks", action="store_true", help="stop at the first NaN")
    command.add_argument("--stats", type=Path, help="write the run's figures to this JSON file")
    for name, default in (("temperature", 0.0), ("top-p", 1.0), ("min-p", 0.0)):
        command.add_argument(f"--{name}", type=float, default=default)
    command.add_argument("--top-k", type=int, default=0)
    command.add_argument("--repetition-penalty", type=float, default=1.0)
    command.add_argument("--seed", type=int)
    command.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> int:
    if options.stats and not options.stats.absolute().parent.is_dir():
        raise FileNotFoundError(f"{options.stats}: there is no such directory for --stats")
    with load(
        options.model,
        options.bits,
        bank_gb=options.bank_gb,
        resident=options.resident,
        reader=options.reader,
        threads=options.threads,
        split=options.split,
        policy=options.policy,
        dtype=options.dtype,
        num_experts_per_tok=options.num_experts_per_tok,
        verify=options.verify,
        checks=options.checks,
    ) as engine:
        run = engine.stream_generate(
            prompt_of(options, engine),
            options.max_tokens,
            prefill_chunk=options.prefill_chunk,
            progress=_prefill_progress if sys.stderr.isatty() else None,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
        )
        interrupted = follow(run, ids=engine.tokenizer is None)
        print(engine.summary(run), file=sys.stderr)
        if options.stats:
            _write_stats(options.stats, engine.summary(run), run)
        return 130 if interrupted else 0


def _prefill_progress(done: int, total: int) -> None:
    end = "\r" if done < total else "\r\x1b[K"
    words = f"prefill {done} of {total} tokens" if done < total else ""
    print(words, end=end, file=sys.stderr, flush=True)


def _write_stats(file: Path, summary: str, run: Run) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {
        "summary": summary,
        "finish_reason": run.finish_reason,
        "tokens": run.tokens,
        "prefill": asdict(run.stats.prefill),
        "decode": asdict(run.stats.decode),
        "peak_rss_nbytes": peak if sys.platform == "darwin" else peak * 1024,
    }
    file.write_text(json.dumps(figures, indent=1) + "\n")


COMMANDS = (_add_generate,)
