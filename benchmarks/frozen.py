"""Groups on a frozen encoder: each measures into `samples` and says what the ratios are."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path

from measure import BenchError, Contender, Samples, alternate, cpu_flags, note, run_child
from setting import (
    CHILD_SECONDS,
    DATA,
    HEADSTART,
    HELP_SECONDS,
    HERE,
    OURS,
    TEXT,
    Bench,
    Ratio,
    distinct_texts,
    faster,
    fresh,
    headstart,
    minilm,
    numbered_texts,
    peer,
    read_rows,
    some_rows,
    texts_file,
    train,
    trained_run,
)


def article(bench: Bench, samples: Samples) -> list[Ratio]:
    """The article's recipe on SST-2 in one table, MiniLM: from nothing, and again with another seed and head."""
    table = some_rows(bench, "sst2/all.csv", bench.size(10**9, 600))
    epochs = str(bench.size(10, 2))
    recipe = ("--recipe", "article", "--model", "minilm", "--epochs", epochs)

    def ours() -> None:
        cache, out = fresh(bench, "cache"), fresh(bench, "run")
        samples.add("headstart", train(table, out, *recipe, cache=cache))
        samples.add("headstart, another seed", train(table, out, *recipe, "--seed", "7", cache=cache))
        other = ("--model", "minilm", "--max-length", "17", "--head", "native")
        samples.add("headstart, another head", train(table, out, *other, cache=cache))

    def loop() -> None:
        samples.add("article loop", peer("article_loop.py", minilm(), table, "--epochs", epochs))

    def trainer() -> None:
        samples.add("Trainer", peer("trainer_frozen.py", minilm(), table, "--epochs", epochs))

    alternate([("headstart", bench.repeats, ours), ("article loop", bench.few, loop), ("Trainer", bench.few, trainer)])
    what = f"article recipe, {epochs} epochs, {len(read_rows(table)):,} texts, MiniLM"
    plain, hf = "the article's loop", "Hugging Face Trainer, frozen body"
    return [
        faster(samples, "headstart", "article loop", what, plain, "at least 15"),
        faster(samples, "headstart", "Trainer", what, hf),
        faster(
            samples, "headstart, another seed", "article loop", "the same again, another seed", plain, "at least 30"
        ),
        faster(
            samples, "headstart, another head", "article loop", "the same again, another head", plain, "at least 30"
        ),
    ]


def article_base(bench: Bench, samples: Samples) -> list[Ratio]:
    """The article's recipe on 3,000 texts with an encoder of bert-base's shape and random weights: speed alone."""
    table = some_rows(bench, "sst2/all.csv", bench.size(3000, 120))
    epochs = str(bench.size(10, 2))
    model = bench.work / "bert-base-random"
    peer("base_model.py", minilm(), model)

    def ours() -> None:
        words = ("--recipe", "article", "--model", model, "--epochs", epochs)
        samples.add("headstart", train(table, fresh(bench, "run"), *words, cache=fresh(bench, "cache")))

    def loop() -> None:
        samples.add("article loop", peer("article_loop.py", model, table, "--epochs", epochs))

    alternate([("headstart", bench.repeats, ours), ("article loop", bench.few, loop)])
    what = f"article recipe, {epochs} epochs, {len(read_rows(table)):,} texts, bert-base's shape with random weights"
    return [faster(samples, "headstart", "article loop", what, "the article's loop", "at least 20", accuracy=False)]


def heads(bench: Bench, samples: Samples) -> list[Ratio]:
    """From SST-2's train and test tables to a tested classifier on the frozen MiniLM, with each tool's defaults."""
    table = some_rows(bench, "sst2/train.csv", bench.size(10**9, 700))
    test, validation = DATA / "sst2" / "test.csv", DATA / "sst2" / "dev.csv"

    def ours() -> None:
        words = ("--validation", validation, "--test", test)
        samples.add("headstart", train(table, fresh(bench, "run"), *words, cache=fresh(bench, "cache")))

    def logreg() -> None:
        samples.add("sentence-transformers + LogisticRegression", peer("st_logreg.py", minilm(), table, test))

    def setfit() -> None:
        samples.add("SetFit head", peer("setfit_head.py", minilm(), table, test))

    alternate(
        [
            ("headstart", bench.repeats, ours),
            ("sentence-transformers + LogisticRegression", min(2, bench.repeats), logreg),
            ("SetFit head", min(2, bench.repeats), setfit),
        ]
    )
    what = f"a tested classifier from {len(read_rows(table)):,} texts, MiniLM frozen, each tool's defaults"
    return [
        faster(samples, "headstart", name, what, against)
        for name, against in (
            ("sentence-transformers + LogisticRegression", "sentence-transformers + LogisticRegression"),
            ("SetFit head", "SetFit's head on a frozen body"),
        )
    ]


def encode(bench: Bench, samples: Samples) -> list[Ratio]:
    """The frozen pass alone over SST-2's training texts, and the matrix-product rate that bounds it."""
    table = some_rows(bench, "sst2/train.csv", bench.size(10**9, 700))

    def ours(precision: str) -> Callable[[], None]:
        def measure() -> None:
            words = [OURS, HERE / "encode_pass.py", "minilm", table, "--precision", precision]
            samples.add(f"headstart, {precision}", run_child(words, limit=CHILD_SECONDS).numbers())

        return measure

    def theirs() -> None:
        test = some_rows(bench, "sst2/dev.csv", 100)
        samples.add("sentence-transformers", peer("st_logreg.py", minilm(), table, test))

    def limit() -> None:
        samples.add("matrix products", run_child([OURS, HERE / "gemm_limit.py"], limit=CHILD_SECONDS).numbers())

    alternate(
        [
            ("headstart, auto", bench.repeats, ours("auto")),
            ("headstart, fp32", bench.repeats, ours("fp32")),
            ("sentence-transformers", bench.repeats, theirs),
            ("matrix products", bench.repeats, limit),
        ]
    )
    ratios = []
    chosen = str(samples.of["headstart, auto"][0]["precision"])
    for name in ("auto", "fp32") if chosen != "fp32" else ("fp32",):
        precision = chosen if name == "auto" else name
        contender = f"headstart, {name}"
        gain = samples.median("sentence-transformers", "encode_seconds") / samples.median(contender, "encode_seconds")
        goal = "at least 3.5" if precision == "bf16" else "at least 2"
        against = "sentence-transformers' encode (fp32)"
        ratios.append(Ratio(f"texts to vectors, MiniLM, {precision}", against, gain, goal=goal))
        rate = samples.median(contender, "flop") / samples.median(contender, "pass_seconds")
        share = rate / samples.median("matrix products", f"{precision}_layer")
        goal = "at least 60%" if precision == "bf16" else ""
        against = "this machine's best matrix products in the model's shapes"
        ratios.append(Ratio(f"FLOP/s of the encoder pass, {precision}", against, share, "share", goal=goal))
    return ratios


def score(bench: Bench, samples: Samples) -> list[Ratio]:
    """Scoring a CSV file into a CSV file, the same native-head run folder in each engine."""
    rows = bench.size(20_000, 600)
    texts = list(dict.fromkeys(itertools.chain(distinct_texts(), numbered_texts())))[:rows]
    random.Random(2021).shuffle(texts)
    table = texts_file(bench, "score.csv", texts)
    run = trained_run(bench, "native")
    bf16 = bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})
    engines = {"onnx-int8": bench.repeats, "onnx-fp32": bench.few}
    engines["openvino-bf16" if bf16 else "openvino-fp32"] = bench.repeats
    outputs = {}

    def ours(name: str, folder: Path) -> Callable[[], None]:
        def measure() -> None:
            outputs[name] = bench.work / f"scored-{name}.csv"
            samples.add(name, headstart("predict", folder, "--input", table, "--output", outputs[name]))

        return measure

    def pipeline() -> None:
        outputs["pipeline"] = bench.work / "scored-pipeline.csv"
        samples.add("pipeline", peer("pipeline_score.py", run, table, outputs["pipeline"]))

    def engine(name: str) -> Callable[[], None]:
        model = bench.work / (name + (".xml" if name.startswith("openvino") else ".onnx"))
        peer("engine_score.py", run, name, model, "--prepare")

        def measure() -> None:
            outputs[name] = bench.work / f"scored-{name}.csv"
            samples.add(name, peer("engine_score.py", run, name, model, "--input", table, "--output", outputs[name]))

        return measure

    contenders: list[Contender] = [
        ("headstart", bench.repeats, ours("headstart", run)),
        ("pipeline", bench.few, pipeline),
        *((name, runs, engine(name)) for name, runs in engines.items()),
        ("headstart, default head", bench.repeats, ours("headstart, default head", trained_run(bench, "auto"))),
    ]
    alternate(contenders)
    agreement = {name: label_agreement(outputs["pipeline"], path) for name, path in outputs.items()}
    for name, share in agreement.items():
        if name != "headstart, default head":  # another classifier
            for numbers in samples.of[name]:
                numbers["agreement"] = share
    what = f"scoring a file of {rows:,} texts"
    against = {
        "pipeline": "transformers.pipeline, batches of 32",
        "onnx-int8": "ONNX Runtime int8",
        "onnx-fp32": "ONNX Runtime fp32",
        "openvino-bf16": "OpenVINO bf16",
        "openvino-fp32": "OpenVINO fp32",
    }
    ratios = []
    for name in ("pipeline", *engines):
        gain = samples.median(name) / samples.median("headstart")
        equal = agreement[name] >= 0.995
        goal = "at least 5" if name == "pipeline" else "at least 1" if equal else ""
        said = f"labels as in fp32: {agreement['headstart']:.1%} against {agreement[name]:.1%}"
        ratios.append(Ratio(what, against[name], gain, note=said, goal=goal))
    gain = samples.median("pipeline") / samples.median("headstart, default head")
    ratios.append(Ratio(f"{what}, headstart's default head", "transformers.pipeline on a native head", gain))
    return ratios


def label_agreement(one: Path, other: Path) -> float:
    """The share of rows that two scored files label alike."""
    pairs = list(zip(read_rows(one), read_rows(other), strict=True))
    if any(a["sentence"] != b["sentence"] for a, b in pairs):
        raise BenchError(f"{one} and {other} are not of the same texts.")
    return sum(a["prediction"] == b["prediction"] for a, b in pairs) / len(pairs)


def cold(bench: Bench, samples: Samples) -> list[Ratio]:
    """One text from a cold start, and the help text."""
    native, pooled = trained_run(bench, "native"), trained_run(bench, "auto")
    contenders: list[Contender] = [
        ("headstart", bench.repeats, lambda: samples.add("headstart", headstart("predict", native, TEXT))),
        ("transformers", bench.repeats, lambda: samples.add("transformers", peer("cold_predict.py", native, TEXT))),
        (
            "headstart, default head",
            bench.repeats,
            lambda: samples.add("headstart, default head", headstart("predict", pooled, TEXT)),
        ),
        ("help", bench.repeats, lambda: samples.add("help", headstart("--help"))),
    ]
    alternate(contenders)
    script = "a five-line transformers script"
    return [
        Ratio(
            "one text from a cold start, wall time",
            script,
            samples.median("headstart") / samples.median("transformers"),
            "share",
            goal="at most 50%",
        ),
        Ratio(
            "the same with headstart's default head",
            script,
            samples.median("headstart, default head") / samples.median("transformers"),
            "share",
            goal="at most 50%",
        ),
        Ratio(
            "headstart --help, wall time",
            f"its budget of {HELP_SECONDS:g} s",
            samples.median("help") / HELP_SECONDS,
            "share",
            goal="at most 100%",
        ),
    ]


def scale(bench: Bench, samples: Samples) -> list[Ratio]:
    """Throughput and peak memory of scoring as the file grows tenfold; all texts have the same make-up."""
    few, many = bench.size(10_000, 500), bench.size(100_000, 5_000)
    texts = list(numbered_texts())
    random.Random(2021).shuffle(texts)
    run = trained_run(bench, "native")
    tables = {"one": texts[:1], "few": texts[:few], "many": texts[:many]}
    files = {name: texts_file(bench, f"scale-{name}.csv", rows) for name, rows in tables.items()}

    def scoring(name: str) -> Callable[[], None]:
        def measure() -> None:
            output = bench.work / "scaled.csv"
            samples.add(name, headstart("predict", run, "--input", files[name], "--output", output))

        return measure

    fewer = min(2, bench.repeats)
    alternate([(name, fewer, scoring(name)) for name in files])
    start = samples.median("one")
    whole = {name: len(tables[name]) / samples.median(name) for name in ("few", "many")}
    running = {name: len(tables[name]) / (samples.median(name) - start) for name in ("few", "many")}
    memory = samples.median("many", "peak_bytes") / samples.median("few", "peak_bytes")
    what, against = f"at {many:,} rows", f"at {few:,} rows"
    return [
        Ratio(
            f"throughput of headstart predict {what}",
            against,
            running["many"] / running["few"],
            "share",
            "less the time to start",
            "at least 95%",
        ),
        Ratio(f"the same, whole process, {what}", against, whole["many"] / whole["few"], "share", goal="at least 95%"),
        Ratio(f"peak memory {what}", against, memory, "share", goal="at most 120%"),
    ]


def trials(bench: Bench, samples: Samples) -> list[Ratio]:
    """Fifty heads tried on stored features, against the encoder's one pass."""
    if "--trials" not in run_child([HEADSTART, "train", "--help"], limit=60).output:
        note("  skipped: this headstart has no --trials")
        return []
    number = bench.size(50, 5)
    table = some_rows(bench, "sst2/train.csv", bench.size(10**9, 700))

    def ours() -> None:
        words = ("--validation", DATA / "sst2" / "dev.csv", "--test", DATA / "sst2" / "test.csv")
        out, cache = fresh(bench, "run"), fresh(bench, "cache")
        samples.add("headstart", train(table, out, *words, "--trials", str(number), cache=cache))

    alternate([(f"headstart, {number} trials", bench.repeats, ours)])
    share = samples.median("headstart", "timing_train") / samples.median("headstart", "timing_encode")
    what = f"{number} trials of heads, {len(read_rows(table)):,} texts, MiniLM"
    return [Ratio(what, "loading the encoder and its one pass", share, "share", goal="at most 100%")]
