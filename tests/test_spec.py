from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from eevp_batch.errors import SpecError
from eevp_batch.spec import (
    MAX_SEED,
    DecaySpec,
    EngineSpec,
    ExitSpec,
    InputSpec,
    JobSpec,
    ModelSpec,
    OutputSpec,
    PromptSpec,
    SamplingSpec,
    VocabSpec,
)
from eevp_batch.spec_file import dump_spec, load_spec, load_spec_text, read_spec

BASE = """\
name: a
input:
  path: in.parquet
model:
  path: ./model
output:
  path: out
"""
LINES = BASE.count("\n")


def load(text: str, *overrides: str) -> JobSpec:
    return load_spec_text(text, "job.yaml", "/jobs", overrides)


def refusal(text: str, *overrides: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        load(text, *overrides)
    return caught.value


# What follows BASE; the line of it that is wrong, the field, what was found, what is allowed.
COMPARED = "exit: {kv: verify}\nsampling: {temperature: 1}\naudit: {full_depth_fraction: 1}"
BAD_INPUTS: list[tuple[str, int, str, str, str]] = [
    ("colour: 1", 1, "colour", "an unknown key", "version, name, input"),
    ("max_new_tokens: 9", 1, "max_new_tokens", "unknown key", "did you mean sampling.max_new_to"),
    ("exit:\n  treshold: 1", 2, "exit.treshold", "an unknown key", "did you mean threshold?"),
    ("exit:\n  threshold: high", 2, "exit.threshold", '"high"', "a number, at least 0"),
    ("exit:\n  threshold: -0.1", 2, "exit.threshold", "-0.1", "a number, at least 0"),
    ("exit:\n  threshold: .nan", 2, "exit.threshold", "NaN", "a number, at least 0"),
    ("exit:\n  threshold:\n  - 0.5\n  - x", 4, "exit.threshold[1]", '"x"', "a number, at least"),
    ("exit:\n  layers: [6, 3]", 2, "exit.layers", "[6, 3]", "strictly increasing"),
    ("exit:\n  layers: [3, 3]", 2, "exit.layers", "[3, 3]", "strictly increasing"),
    ("exit:\n  layers: [0, 3]", 2, "exit.layers[0]", "0", "an integer, at least 1"),
    ("exit:\n  layers: []", 2, "exit.layers", "[]", "a list"),
    ("exit:\n  mode: maybe", 2, "exit.mode", '"maybe"', "on, off"),
    ("exit:\n  confidence: gut", 2, "exit.confidence", '"gut"', "margin, max_prob, entropy"),
    ("exit:\n  kv: guess", 2, "exit.kv", '"guess"', "propagate, bridge, recompute, verify"),
    ("exit:\n  max_waiting: 0", 2, "exit.max_waiting", "0", "an integer, at least 1"),
    (
        "exit:\n  kv: verify\n  vocab: {final_head: pruned}",
        3,
        "exit.vocab.final_head",
        '"pruned"',
        "full with exit.kv: verify",
    ),
    (COMPARED, 3, "audit.full_depth_fraction", "1.0", "0 where exit.kv is verify and sampling"),
    ("exit:\n  decay: {}", 2, "exit.decay.temperature", "nothing", "(required)"),
    ("exit:\n  decay: 4", 2, "exit.decay", "4", "a mapping with keys temperature, scaled"),
    ("exit:\n  vocab: {top_k: 0}", 2, "exit.vocab.top_k", "0", "at least 1, or null"),
    ("exit:", 1, "exit", "null", "a mapping with keys mode"),
    ("sampling: {top_p: 0}", 1, "sampling.top_p", "0", "more than 0, at most 1"),
    ("sampling: {n: true}", 1, "sampling.n", "true", "an integer, at least 1"),
    ("sampling: {seed: 9223372036854775808}", 1, "sampling.seed", "922", "at most 922337203685"),
    ("sampling: {stop: [a, '']}", 1, "sampling.stop[1]", '""', "a string, not empty"),
    ("sampling: {stop: a}", 1, "sampling.stop", '"a"', "a list"),
    ("run: {chunk_rows: 1.0}", 1, "run.chunk_rows", "1.0", "an integer, at least 1"),
    ("run: {max_error_rate: 1.5}", 1, "run.max_error_rate", "1.5", "at most 1"),
    ("engine: {kv_memory: 2GB}", 1, "engine.kv_memory", '"2GB"', "2GiB or 512MiB"),
    ("cluster: {replicas: 0}", 1, "cluster.replicas", "0", "at least 1, or a mapping with keys"),
    ("cluster: {replicas: {min: 2}}", 1, "cluster.replicas", '{"min": 2}', "with keys min, max"),
    ("cluster: {replicas: {max: 0}}", 1, "cluster.replicas.max", "0", "an integer, at least 1"),
    ("cluster: {replicas: {min: 4, max: 3}}", 1, "cluster.replicas.max", "3", "at least 4"),
    ("cluster: {gpus_per_replica: 1.5}", 1, "cluster.gpus_per_replica", "1.5", "a whole number"),
    ("cluster: {placement_timeout_s: 0}", 1, "cluster.placement_timeout_s", "0", "more than 0"),
    ("exit: {mode: learn}\ncluster: {gpus_per_replica: 2}", 2, "cluster.gpus_per_replica", "2", ""),
    ("cluster: {cpus_per_replica: 0}", 1, "cluster.cpus_per_replica", "0", "more than 0"),
    ("cluster: {address: ftp://head}", 1, "cluster.address", '"ftp://head"', "auto, ray://host"),
    ("cluster: {shared_paths: [nfs]}", 1, "cluster.shared_paths[0]", '"nfs"', "an absolute path"),
    ("cluster: {entry_point: {resources: {a: 0}}}", 1, "cluster.entry_point.resources.a", "0", "m"),
    ("prompt: {on_overlong: drop}", 1, "prompt.on_overlong", '"drop"', "error, trunc"),
    ("prompt: {chat: 'yes'}", 1, "prompt.chat", '"yes"', "auto, or true or false"),
    ("version: 2", 1, "version", "2", "1"),
    ("version: true", 1, "version", "true", "1"),
    ("version: 1.0", 1, "version", "1.0", "1"),
    ("name: b", 1, "name", "a second time, first on line 1", "each key once"),
    ("run: {chunk_rows: 1, chunk_rows: 1}", 1, "run.chunk_rows", "a second time", "each key once"),
    ("\tversion: 1", 1, "document", "\\t", "indented with spaces"),
    ("run:\n\tchunk_rows: 1", 2, "document", "\\t", "indented with spaces"),
    ("exit: &e {mode: on}\nrun: *e", 2, "document", "the alias *e", "the value itself"),
    ("run: !!python/object:os.system {}", 1, "run", "the tag", "a value without a tag"),
    ("run: !!set {a}", 1, "run", "the tag !!set", "a value without a tag"),
    ("run: {chunk_rows: !!int many}", 1, "run.chunk_rows", "many", "a value that is int"),
    ("1: 2", 1, "document", "the key 1", "keys that are strings"),
    ("[a]: 2", 1, "document", "a list or mapping as key", "keys that are strings"),
    ("run: {chunk_rows: " + "9" * 5000 + "}", 1, "run.chunk_rows", "digits", "a shorter number"),
    ("run: " + "[" * 500, 1, "document", "more than 20 levels", "fewer levels"),
    ("run: {chunk_rows: 1", 2, "document", "expected", "one YAML document"),
    ("---\nname: a", 1, "document", "another document", "one YAML document"),
    ("run: \x07", 1, "document", "the character U+0007", "printable characters"),
]


@pytest.mark.parametrize(
    ("addition", "line", "field", "found", "allowed"),
    BAD_INPUTS,
    ids=[f"{field}-{found[:12]}" for _, _, field, found, _ in BAD_INPUTS],
)
def test_a_bad_field_names_file_line_field_found_and_allowed(
    addition: str, line: int, field: str, found: str, allowed: str
) -> None:
    error = refusal(BASE + addition + "\n")
    assert error.file == "job.yaml", "an error names the file"
    assert error.field == field, f"the error should be about {field}: {error}"
    assert error.line == LINES + line, f"the error should be on line {LINES + line}: {error}"
    assert found in str(error.found), f"the error should say what stands there: {error}"
    assert allowed in error.allowed, f"the error should say what may stand there: {error}"
    assert str(error).count("\n") == 0, "an error is one line"


def test_a_missing_key_has_the_line_of_its_section() -> None:
    error = refusal("name: a\ninput:\n  id_column: id\nmodel: {path: m}\noutput: {path: o}\n")
    assert (error.line, error.field, error.found) == (2, "input.path", "nothing")
    error = refusal("input: {path: i}\nmodel: {path: m}\n")
    assert (error.line, error.field, error.found) == (1, "output", "nothing")


def test_a_misspelt_key_is_told_before_the_key_that_it_leaves_missing() -> None:
    error = refusal("input:\n  pth: x\nmodel: {path: m}\noutput: {path: o}\n")
    assert (error.line, error.field) == (2, "input.pth")
    assert "did you mean path?" in error.allowed


@pytest.mark.parametrize(
    ("text", "found"),
    [("", "an empty file"), ("# only this\n", "an empty file"), ("- 1\n", "[1]"), ("7", "7")],
)
def test_a_document_that_is_no_mapping_is_refused(text: str, found: str) -> None:
    error = refusal(text)
    assert (error.line, error.field, error.found) == (1, "document", found)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    with pytest.raises(SpecError, match=r"none\.yaml: job file: found no such file"):
        load_spec(missing)
    with pytest.raises(SpecError, match="is a directory"):
        load_spec(tmp_path)
    job = tmp_path / "job.yaml"
    job.write_bytes(BASE.encode() + b"\n# caf\xe9")
    with pytest.raises(SpecError, match=rf"job\.yaml:{LINES + 2}: .*not UTF-8"):
        load_spec(job)
    job.write_text(BASE + "#" * (1 << 20))
    with pytest.raises(SpecError, match="more than 1 MiB"):
        load_spec(job)


def test_bare_on_and_off_mean_what_they_say() -> None:
    for word in ("on", "off"):
        for value in (word, f"'{word}'"):
            spec = load(BASE + f"exit: {{mode: {value}}}\n")
            assert spec.exit.mode == word, f"mode: {value} is {word}"
    assert load(BASE + "exit: {mode: true}\n").exit.mode == "on"
    assert load(BASE, "exit.mode=off").exit.mode == "off"


def test_numbers_are_read_as_yaml_1_2_reads_them() -> None:
    spec = load(BASE + "run: {max_error_rate: 1e-3, chunk_rows: 010}\nsampling: {seed: 0x10}\n")
    assert spec.run.max_error_rate == 0.001, "1e-3 is a number"
    assert spec.run.chunk_rows == 10, "010 is ten, not eight"
    assert spec.sampling.seed == 16, "0x10 is sixteen"
    error = refusal(BASE + "run: {chunk_rows: 1:30}\n")
    assert error.found == '"1:30"', "1:30 is a string, not ninety"


def test_integers_stand_for_floats_but_not_the_other_way() -> None:
    assert load(BASE + "exit: {threshold: 1}\n").exit.threshold == 1.0
    assert ExitSpec(threshold=[1, 0]).threshold == [1.0, 0.0]
    assert SamplingSpec(temperature=1).temperature == 1.0


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("2GiB", 2 << 30), ("512MiB", 512 << 20), ("1.5KiB", 1536), ("1 TiB", 1 << 40), ("99", 99)],
)
def test_sizes_are_bytes(text: str, num_bytes: int) -> None:
    assert load(BASE + f"engine: {{kv_memory: {text}}}\n").engine.kv_memory == num_bytes
    assert EngineSpec(kv_memory="2GiB").kv_memory == 2 << 30  # type: ignore[arg-type]


def test_zero_bytes_are_refused() -> None:
    assert refusal(BASE + "engine: {kv_memory: 0GiB}\n").field == "engine.kv_memory"


# --- prompts -------------------------------------------------------------------------------------


def test_messages_or_a_template_turn_the_default_prompt_column_off() -> None:
    assert load(BASE).input.prompt_column == "prompt"
    assert load(BASE, "input.messages_column=m").input.prompt_column is None
    assert load(BASE, "prompt.template='{{ a }}'").input.prompt_column is None
    assert InputSpec(path="x", messages_column="m").prompt_column is None


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["input.messages_column=m", "input.prompt_column=p"], "input.prompt_column"),
        (["prompt.template=t", "input.prompt_column=p"], "input.prompt_column"),
        (["prompt.template=t", "input.messages_column=m"], "input.messages_column"),
        (["input.prompt_column=null"], "input.prompt_column"),
        (["input.keep_columns=[a, b, a]"], "input.keep_columns[2]"),
        (["model.trust_remote_code=true"], "model.revision"),
        (["model.trust_remote_code=true", "model.revision=main"], "model.revision"),
    ],
)
def test_fields_that_exclude_each_other_are_refused(overrides: list[str], field: str) -> None:
    assert refusal(BASE, *overrides).field == field


def test_trusted_code_is_pinned() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    spec = load(BASE, "model.trust_remote_code=true", f"model.revision={commit}")
    assert spec.model.revision == commit


# --- --set ---------------------------------------------------------------------------------------


def test_set_overrides_a_field_and_the_last_one_wins() -> None:
    spec = load(BASE + "run: {chunk_rows: 7}\n", "run.chunk_rows=8", "run.chunk_rows=9")
    assert spec.run.chunk_rows == 9
    assert load(BASE, "sampling.stop=['a=b', \"\\n\"]").sampling.stop == ["a=b", "\n"]
    assert load(BASE, "exit.decay.temperature=4").exit.decay == DecaySpec(temperature=4)
    assert load(BASE + "exit: {decay: null}", "exit.decay={temperature: 4}").exit.decay
    assert load(BASE, "input={path: y}").input.path == "/jobs/y"


@pytest.mark.parametrize(
    ("override", "field", "found"),
    [
        ("run.chunk_rows=0", "run.chunk_rows", "0"),
        ("run.chunk_rows=", "run.chunk_rows", "null"),
        ("run.chunk_rows", "run.chunk_rows", "'run.chunk_rows'"),
        ("=3", "", "'=3'"),
        ("run..x=3", "run..x", "'run..x=3'"),
        ("rum.chunk_rows=3", "rum", "an unknown key"),
        ("input.path.x=3", "input.path", '"in.parquet"'),
        ("exit.threshold=[0.5, x]", "exit.threshold[1]", '"x"'),
        ("exit.decay={temprature: 4}", "exit.decay.temprature", "an unknown key"),
        ("run={chunk_rows: [}", "run", "expected"),
        ("exit=*a", "exit", "the alias *a"),
    ],
)
def test_a_bad_override_is_blamed_on_the_option(override: str, field: str, found: str) -> None:
    error = refusal(BASE, override)
    assert error.file.startswith("--set"), f"the option is to blame, not a line: {error}"
    assert error.line is None
    assert error.field == (field or error.field)
    assert found in str(error.found), str(error)


def test_an_override_does_not_hide_an_error_of_the_file() -> None:
    error = refusal(BASE + "sampling: {n: 0}\n", "run.chunk_rows=3")
    assert (error.file, error.line, error.field) == ("job.yaml", LINES + 1, "sampling.n")


# --- paths ---------------------------------------------------------------------------------------


def test_relative_paths_start_at_the_job_file(tmp_path: Path) -> None:
    (tmp_path / "jobs" / "local-model").mkdir(parents=True)
    job = tmp_path / "jobs" / "job.yaml"
    job.write_text(BASE)

    def spec_of(*overrides: str) -> JobSpec:
        return load_spec(job, overrides)

    assert spec_of().input.path == str(tmp_path / "jobs" / "in.parquet")
    assert spec_of().output.path == str(tmp_path / "jobs" / "out")
    assert spec_of().model.path == str(tmp_path / "jobs" / "model")
    assert spec_of("model.path=../m").model.path == str(tmp_path / "m")
    assert spec_of("model.path=local-model").model.path == str(tmp_path / "jobs" / "local-model")
    assert spec_of("model.path=org/name").model.path == "org/name", "a hub id stays"
    assert spec_of("input.path=[a, s3://b/c]").input.path == [
        str(tmp_path / "jobs" / "a"),
        "s3://b/c",
    ]
    assert spec_of("output.path=gs://b/c").output.path == "gs://b/c", "a URI stays"
    assert spec_of("output.path=/x/../y").output.path == "/y"


def test_a_source_knows_the_line_of_every_field(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(BASE + "exit:\n  layers:\n  - 3\n  - 6\n")
    source = read_spec(job, ["run.chunk_rows=3"])
    lines = {
        "name": 1,
        "input.path": 3,
        "input.id_column": 2,
        "exit.layers[1]": LINES + 4,
        "exit.threshold": LINES + 1,
        "run.chunk_rows": None,
        "sampling.n": 1,
    }
    assert {field: source.origin(field).line for field in lines} == lines


# --- dump ----------------------------------------------------------------------------------------

TEXTS = st.text(min_size=1, max_size=12).filter(
    lambda text: all(ord(c) < 0xD800 or ord(c) > 0xDFFF for c in text)
)
SHARES = st.floats(0, 1, exclude_min=True)


@st.composite
def specs(draw: st.DrawFn) -> JobSpec:
    layers = draw(st.one_of(st.just("auto"), st.sets(st.integers(1, 99), min_size=1).map(sorted)))
    template = draw(st.none() | TEXTS)
    return JobSpec(
        name=draw(st.from_regex(r"[A-Za-z0-9._-]+", fullmatch=True)),
        input=InputSpec(
            path=[f"/{draw(st.integers())}", "s3://b/*"],
            id_column=draw(TEXTS),
            prompt_column=None if template else draw(TEXTS),
            keep_columns=draw(st.sets(TEXTS, max_size=3).map(sorted) | st.just("all")),
            limit=draw(st.none() | st.integers(1, 10**12)),
        ),
        prompt=PromptSpec(
            chat=draw(st.sampled_from(["auto", True, False])),
            system=draw(st.none() | TEXTS),
            template=template,
        ),
        model=ModelSpec(path="/m"),
        exit=ExitSpec(
            mode=draw(st.sampled_from(["on", "off"])),
            layers=layers,
            threshold=draw(st.floats(0, 1e30) | st.lists(SHARES, max_size=3)),
            vocab=VocabSpec(top_k=draw(st.none() | st.integers(1, 999))),
        ),
        sampling=SamplingSpec(
            top_p=draw(SHARES),
            stop=draw(st.lists(TEXTS, max_size=3)),
            seed=draw(st.integers(0, MAX_SEED)),
        ),
        engine=EngineSpec(kv_memory=draw(st.just("auto") | st.integers(1, 2**60))),
        output=OutputSpec(path="/o"),
    )


@given(specs())
@example(load(BASE, "name=off", "sampling.stop=['1e3', on, '0o7', '~', '2020-01-01', '1:30']"))
def test_a_dumped_job_reads_back_equal(spec: JobSpec) -> None:
    assert load_spec_text(dump_spec(spec), "job.resolved.yaml", "/") == spec


@given(st.text(max_size=200))
@example("a: [")
@example("%YAML 9.9\n---\na: 1")
@example("? a\n: b")
@example("<<: {a: 1}")
def test_any_text_is_a_job_or_a_spec_error(text: str) -> None:
    try:
        load(text)
    except SpecError as error:
        assert error.field and error.allowed, "every refusal says where and what is allowed"


def test_a_dumped_job_has_every_field() -> None:
    dumped = yaml.safe_load(dump_spec(load(BASE)))
    assert list(dumped) == list(JobSpec.model_fields)
    assert list(dumped["exit"]) == list(ExitSpec.model_fields)


# --- the models themselves -----------------------------------------------------------------------


def sections(model: type[BaseModel] = JobSpec) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind)


def test_every_field_is_explained_in_one_line() -> None:
    for model in sections():
        assert model.__doc__, f"{model.__name__} has a docstring"
        for name, field in model.model_fields.items():
            text = field.description or ""
            assert text.endswith("."), f"{model.__name__}.{name} has a docstring, a sentence"
            assert "\n" not in text, f"{model.__name__}.{name} has a docstring of one line"


def test_every_field_but_the_paths_has_a_default() -> None:
    required = {
        f"{model.__name__}.{name}"
        for model in sections()
        for name, field in model.model_fields.items()
        if field.is_required()
    }
    assert required == {
        "JobSpec.input",
        "JobSpec.model",
        "JobSpec.output",
        "InputSpec.path",
        "ModelSpec.path",
        "OutputSpec.path",
        "DecaySpec.temperature",
        "ReplicaRange.max",
    }


def test_a_spec_is_frozen() -> None:
    spec: Any = load(BASE)
    with pytest.raises(ValueError, match="frozen"):
        spec.exit.threshold = 0.5


def test_reading_a_job_imports_nothing_heavy() -> None:
    code = (
        "import sys, eevp_batch.spec, eevp_batch.spec_file, eevp_batch.model_config, "
        "eevp_batch.cli\n"
        "heavy = {'torch', 'ray', 'transformers', 'pyarrow', 'accelerate', 'numpy'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"reading a job imports {done.stderr}"
