"""Shared by all tests: a cache of their own, tiny random encoders built offline, and a table that can be learnt."""

import contextlib
import csv
import functools
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.nodes import HEADSTART, Begin, Nodes, running

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
# Read once, when torch is imported. On tensors this small threads only wait for each other: on a busy machine of two
# cores the tests take three times as long with two of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

NOUNS = ("film", "hotel", "soup", "phone", "app", "waiter", "room", "story", "battery", "service")
GOOD = ("superb", "lovely", "great", "charming")
BAD = ("awful", "boring", "broken", "rude")
FILLERS = ("the", "a", "was", "is", "very", "not", "and", "but", "i", "it", "at", "end", "of", "this", "un", ",", ".")
WORDS = (*NOUNS, *GOOD, *BAD, *FILLERS)

SMALL_ROWS = tuple(
    (f"the {noun} was {adjective}", label)
    for adjectives in zip(GOOD, BAD, strict=True)
    for noun in NOUNS
    for adjective, label in zip(adjectives, ("1", "0"), strict=True)
)
"""80 distinct texts, 40 of each label; one word decides the label."""


LIGHT = """
import sys
from headstart.cli import main
try:
    main(sys.argv[1:])
finally:
    heavy = ("torch", "transformers", "sklearn", "scipy", "safetensors", "huggingface_hub")
    loaded = [name for name in heavy if name in sys.modules]
    print("loaded:", *loaded, file=sys.stderr)
"""
"""Runs the command line, and says in the end what it loaded of what a scored text has no need of."""


@pytest.fixture(autouse=True, scope="session")
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures that outlive a test write to a cache of the session, never to the person's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADSTART_CACHE_DIR", str(tmp_path_factory.mktemp("session-cache")))
        yield


@pytest.fixture(autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own feature store; it starts empty and lies outside `tmp_path`."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HEADSTART_CACHE_DIR", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HEADSTART_CACHE_MAX_BYTES", raising=False)
    return folder


# --- tiny random encoders

FAMILIES = ("bert", "distilbert", "roberta", "electra", "albert", "mpnet", "deberta-v2", "modernbert")
"""Model types that are tested; others are tried as they are."""


def tiny_tokenizer(family: str) -> Any:
    """A small fast tokenizer with the family's special tokens at the family's ids."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    if family in ("roberta", "mpnet"):  # both pad with id 1
        special = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    elif family == "albert":
        special = {"pad": "<pad>", "unk": "<unk>", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    elif family == "deberta-v2":
        special = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "mask": "[MASK]"}
    else:
        special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    if family in ("roberta", "modernbert"):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges: list[tuple[str, str]] = []
        pieces = [*special.values(), *alphabet]
        for word in WORDS:
            for form in (f"Ġ{word}", word):
                for end in range(2, len(form) + 1):
                    if form[:end] not in pieces:
                        pieces.append(form[:end])
                        merges.append((form[: end - 1], form[end - 1]))
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        fast = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=special["unk"]))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        fast.decoder = decoders.ByteLevel()
    else:
        pieces = [*special.values(), *letters, *(f"##{letter}" for letter in letters), *"!?'\"-"]
        pieces += [word for word in WORDS if word not in pieces]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        fast = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token=special["unk"]))
        fast.normalizer = normalizers.BertNormalizer(lowercase=True)
        fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        fast.decoder = decoders.WordPiece()
    ends = [(special[name], vocabulary[special[name]]) for name in ("cls", "sep")]
    fast.post_processor = processors.TemplateProcessing(
        single=f"{special['cls']} $A {special['sep']}",
        pair=f"{special['cls']} $A {special['sep']} $B {special['sep']}",
        special_tokens=ends,
    )
    names = {f"{name}_token": token for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=fast, model_max_length=64, **names)


def tiny_config(family: str, tokenizer: Any) -> Any:
    """The family's configuration at hidden 32, 3 layers, 2 heads and 64 tokens."""
    from transformers import AutoConfig

    # Wide first weights, so that layers differ and a wrong one is seen.
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
        "max_position_embeddings": 66 if family in ("roberta", "mpnet") else 64,
    }
    if family == "distilbert":
        shape |= {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64}
    else:
        shape |= {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    if family in ("albert", "electra"):
        shape |= {"embedding_size": 16}
    if family == "deberta-v2":
        shape |= {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
            "type_vocab_size": 0,
        }
    if family == "modernbert":
        ends = {"bos": "cls", "cls": "cls", "eos": "sep", "sep": "sep"}
        shape |= {f"{name}_token_id": getattr(tokenizer, f"{role}_token_id") for name, role in ends.items()}
        shape |= {"local_attention": 8, "global_attn_every_n_layers": 2}
    return AutoConfig.for_model(family, **shape)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name -> folder of a tiny random encoder of it, made once a session. Do not write into it."""

    @functools.cache
    def build(family: str) -> Path:
        import torch
        from transformers import AutoModel

        from headstart.encoder import quiet_transformers

        folder = tmp_path_factory.mktemp("models") / f"tiny-{family}"
        tokenizer = tiny_tokenizer(family)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        model = AutoModel.from_config(tiny_config(family, tokenizer), dtype=torch.float32)
        torch.set_rng_state(state)
        with quiet_transformers():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def tiny_bert(tiny_models: Callable[[str], Path]) -> Path:
    """The folder of a tiny random BERT, with a pooler."""
    return tiny_models("bert")


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, tiny_models: Callable[[str], Path]) -> Callable[..., Path]:
    """Family name (and labels, else LABEL_0 to LABEL_2) -> folder of a tiny random classifier by transformers alone.

    Do not write into it: copy it first.
    """

    @functools.cache
    def build(family: str, *labels: str) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification

        from headstart.encoder import quiet_transformers

        folder = tmp_path_factory.mktemp("elsewhere") / family
        shutil.copytree(tiny_models(family), folder)
        named = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        config = AutoConfig.from_pretrained(folder, **(named if labels else {"num_labels": 3}))
        state = torch.get_rng_state()
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        torch.set_rng_state(state)
        with quiet_transformers():
            model.save_pretrained(folder)
        return folder

    return build


# --- tables


def write_csv(path: Path, rows: Iterable[Sequence[str]], *header: str) -> Path:
    """Write rows under a header (`sentence,label` unless given), quoted where needed."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(itertools.chain([header or ("sentence", "label")], rows))
    return path


STAR_WORDS = ("awful", "boring", "not very good", "great", "superb")


def kinds_of_rows() -> dict[str, list[tuple[str, str]]]:
    """Tables with several labels a text, with stars, and with long texts whose end alone tells their label."""
    import numpy as np

    random = np.random.default_rng(0)
    topics = {"food": "soup", "staff": "waiter", "room": "room"}
    several, stars = [], []
    for i in range(150):
        own = [name for name in topics if random.random() < 0.4]
        words = " and the ".join(topics[name] for name in own) or "story"
        several.append((f"the {words} {i} was at the end", "|".join(own) or "|"))
        stars.append((f"the {NOUNS[i % 10]} {i} was {STAR_WORDS[i % 5]}", str(i % 5 + 1)))
    long = []
    for i in range(80):
        filler = " ".join(["the story of the film at the end"] * 12)
        long.append(
            (f"{filler} {i} was {(GOOD, BAD)[i % 2][i // 2 % 4]} and {(GOOD, BAD)[i % 2][i // 8 % 4]}", "pn"[i % 2])
        )
    return {"multi": several, "ordered": stars, "long": long}


@pytest.fixture
def small_table(tmp_path: Path) -> Path:
    """A CSV of 80 distinct texts with the labels 0 and 1, which a head on a tiny encoder can learn."""
    return write_csv(tmp_path / "small.csv", SMALL_ROWS)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, _session_cache: None) -> Path:
    """A finished run folder of a tiny encoder on the small table. Do not write into it: copy it first."""
    from headstart.config import settings
    from headstart.run import train

    folder = tmp_path_factory.mktemp("runs")
    table = write_csv(folder / "small.csv", SMALL_ROWS)
    given: dict[str, Any] = {
        "model": str(tiny_bert),
        "out": str(folder / "run"),
        "device": "cpu",
        "epochs": 20,
        "thaw": "0",
    }
    train(settings(str(table), **given))
    return folder / "run"


EXACT: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
QUICK: dict[str, Any] = {
    **EXACT,
    **{"head_features": ("mean-2",), "head_width": 0, "lr": 1e-2, "weight_decay": 0.01, "epochs": 4},
    "thaw": "0",
}
"""A head with nothing left to search, on a frozen encoder."""


@pytest.fixture
def train(tiny_bert: Path, tmp_path: Path) -> Callable[..., Any]:
    """Train a quick head on rows (written as a table) into a folder of the given name."""

    def call(rows: Iterable[tuple[str, str]] = SMALL_ROWS, out: str = "run", **given: Any) -> Any:
        from headstart import config, run

        table = write_csv(tmp_path / f"{out}.csv", rows)
        chosen = {"model": str(tiny_bert), "out": str(tmp_path / out), **QUICK, **given}
        return run.train(config.settings(str(table), **chosen))

    return call


@pytest.fixture(scope="session")
def exported_run(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """A copy of the tiny run with its export: it is scored without torch. Do not write into it: copy it first."""
    from headstart.export import export

    folder = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(tiny_run, folder)
    export(folder, "fp32", "refuses")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets beside the repository; the test is skipped where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("there is no ../shared/data here")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 100 kB; the test is skipped where mounting is not permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running(3) as found:
        yield found


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Begins commands, on nodes or, without any, on a cluster of their own; those left at the end are killed."""
    begun = list[subprocess.Popen[str]]()

    def start(*arguments: str, nodes: Nodes | None = None, **more: str) -> subprocess.Popen[str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        where, environment = ([nodes.address], nodes.environment) if nodes else (["--workers", "2"], own)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [*HEADSTART, *arguments, "--ray", *where]
        begun.append(subprocess.Popen(command, env={**environment, **more}, **pipes))
        return begun[-1]

    yield start
    for process in begun:
        if process.poll() is None:
            for one in (*psutil.Process(process.pid).children(recursive=True), process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        process.communicate(timeout=60)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C is as Python has it: what a shell runs in its background ignores it, tests too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
