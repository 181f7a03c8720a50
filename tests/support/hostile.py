"""A corpus of hostile settings, by kinds: words that YAML misreads, small texts that stand for much, files that are no
settings, and the valid recipe with any of it put in.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from common.yaml_tree import MOST_BYTES, MOST_VALUES, to_yaml
from tests.support.tiny import tiny_tree

RECIPE = to_yaml(tiny_tree(run="nowhere/run", data__path="nowhere/data"))

WORDS = r"""
2026-13-45 | 2024-01-02 | 0000-00-00 | 2001-12-14t21:59:43.10-05:00 | 99999-01-01 | 2024-02-30 1:1 | 010 | 0o17 | 0x1F
0b11 | 1:30 | 190:20:30.15 | 1_000 | 1__0 | _1 | +-1 | 1e | 1e+ | e5 | . | 1e99999 | .inf | -.INF | .NaN | +.nan | 1e400
-1e400 | 5e-324 | 1.7976931348623157e308 | yes | No | ON | off | y | n | ~ | null | NULL | = | << | ! | !!str | & | *
>
%x | @x | `x` | ! x | !foo 1 | !!python/object/apply:os.system [ls] | !!python/name:os.system | !!python/tuple [1]
!!binary aGk= | !!set {a} | !!omap [a: 1] | !!pairs [a: 1] | !!timestamp 2024-01-01 | !!int '3' | !!float x | !!map {}
{{ name }} | {{ a.b }} | {? [1] : 2} | {[1]: 2} | {{}: 1} | {a, b} | [a: 1] | {: 1} | {a: 1, a: 2} | {<<: 1} | a: b: c
"\ud800" | "\udfff\ud800" | "\ud83d\ude00" | "\0" | "\e[2J" | "\x7f" | "\u2028" | "\a\b" | "\q" | ' | " | '' | [] | {}
*nothing | &a *a | &a [*a] | &a {b: *a} | &a &b 1 | [&a 1, *a, *b] | [[1]] | {a: {b: {c: {}}}} | -1 | 0 | 1.5 | true
x y
"""
KEYS = r"""
a: 1, a: 1 | a: {b: 1}, a: {c: 1} | ? a | ? [a] | ? {a: b} | ? &k a | &k a: 1 | !!str a: 1 | *k : 1 | : 1 | '': 1
null: 1
true: 1 | 1: 1 | 1.5: 1 | ~: 1 | 2024-01-01: 1 | <<: 1 | <<: [1] | <<: {a: 1} | <<: [{a: 1}, [2]] | '<<': 1 | 'a\nb': 1
"a\nb": 1 | "\0": 1 | "\ud800": 1 | "\e[31m": 1 | {{ a }}: 1 | [a]: 1 | run: {run: {run: 1}} | run.x: 1 | "": 1
on: off
"""
DOCUMENTS: list[str | bytes] = [
    *("", "\n", "---", "--- \n..."),
    *("---\n---\n", "a: 1\n---\nb: 2", "a: 1\n...\nb: 2", "%YAML 1.1\n---\na: 1", "%YAML 9.9\n--- 1"),
    *("%TAG ! tag:x,2000:\n---\n!a 1", "- 1", "text", "1", "null"),
    *("[]", "{}", "# nothing", "'a'", "a:\n\tb: 1", "a: 1\n b: 2"),
    *("a: 'x\nb: 1", 'a: "x\nb: 1', "a: [1\nb: 2", "a: {b: 1"),
    *("a: |\nb", "a: 1\na: 1", "? a\n? b", "a: 1\r\nb: 2\r\n", "a: 1\rb: 2"),
    *("\ufeffa: 1", "a: \ufeff1", "k" * 201 + ": 1", "? " + "k" * 5000),
    *("run: " * 100, "<<: {a: 1}\n<<: {b: 1}", "\t", "a\tb: 1"),
    *(b"\xff\xfea\x00", "a: 1".encode("utf-16"), "a: 1".encode("utf-32")),
    *("a: \xe9".encode("latin-1"), b"\xed\xa0\x80", b"\xc0\x80"),
    *(b"\x89PNG\r\n\x1a\n\x00", b"\x1f\x8b\x08", b"\x7fELF"),
    *(b"PK\x03\x04", bytes(range(256)), b"\0" * 1000, b"a: \xf4\x90\x80\x80"),
    *("x" * (MOST_BYTES + 1), "# " + "x" * (MOST_BYTES - 2)),
    *("a: " + "x" * (MOST_BYTES - 3), "\n" * MOST_BYTES, "'" + "\n" * 100_000),
    *(b"a: " + bytes([byte]) + b"b" for byte in [*range(0x20), 0x7F, 0x80, 0x9F]),
    *(f"a: {character}b" for character in "\x7f\x85\xa0\u200b\u202e\u2028\u2029\ufffe\uffff\U0001f600\U0010ffff"),
    "a:\n" + "".join(" " * depth + "b:\n" for depth in range(1, 60)),
]  # fmt: skip
LONG = [
    *("1" * 20, "1" * 30, "1" * 4301, "-" + "9" * 5000, "1" + "_" * 5000 + "1", "1" * 5000 + ".5", "0x" + "f" * 5000),
    *("[" * 50 + "]" * 50, "{a: " * 50 + "1" + "}" * 50, "[" * 5000, "{" * 5000, "[{" * 2000, "- " * 3000, "? " * 3000),
    *("!" * 5000, "&" + "a" * 5000 + " 1", "'" + "x" * 300 + "'"),
    *("'" + "x/" * 3000 + "'", "x" * 5000, "\\" * 5000, "%" * 5000),
]  # fmt: skip

SETTINGS = r"""
train.seed=18446744073709551616
train.seed=9223372036854775808
train.steps=1000000001
train.steps=010
train.tokens_per_step=99999999999999999999
run="a\0b"
run="a\nb"
run=
run=''
run={{ name }}
data.path="\e[2J"
data.path=2024
timeouts.save_s=.inf
timeouts.save_s=1e12
timeouts.collective_s=1e-9
checkpoint.grace_s=1e300
optim.lr=.inf
optim.lr=1e300
optim.eps=1e-45
optim.betas=[0.9, 1]
energy.pue=1e300
energy.grid=.nan
head.exponent=1e300
head.exponent=-1
head.exponent={first: 1, last: 1e300}
head.init_std=1e-300
head.init_std=gpt3
head.feature_length=0
optim.head_lr_scale=1e9
optim.head_lr_scale=0
optim.prototype_decay=-1
optim={also_decay: [prototypes], prototype_decay: 0.1}
head.label_smoothing=1
head.z_loss=-1
head.soft_cap=30
head={distance: dot, soft_cap: 0}
head.params={p: .nan}
head={distance: minkowski, params: {p: 1e-3}}
head={distance: minkowski, params: {p: 1e300}}
head={distance: hamming, params: {temperature: 1e-300}}
model.norm_eps=1e-300
model.dim=99999999999999999999
model.layers=1000000
model.positions={theta: 1e300}
resume=
resume=''
resume="a\0b"
deepspeed.zero_optimization.overlapcomm=true
deepspeed.zero_optimization.reduce_bucket_size=two
deepspeed.zero_optimization.reduce_bucket_size=0
deepspeed.zero_optimization.allgather_bucket_size=3
deepspeed.zero_optimization.stage=2
deepspeed.zero_optimization.offload_param={device: cpu}
deepspeed.zero_optimization.offload_optimizer={device: nvme}
deepspeed.zero_optimization.offload_optimizer={devise: cpu}
deepspeed.zero_optimization=1
deepspeed.torch_autocast={enabled: true}
deepspeed.x=1
deepspeed=[1]
"""
OVERRIDES = [
    *SETTINGS.strip().splitlines(),
    *("=", "=1", "a=", "a..b=1", ".a=1", "a.=1", " a=1", "a =1", "a\n=1", "a\0=1", "\x1b[2J=1", "k" * 300 + "=1"),
    *("." * 500 + "=1", ".".join("a" * 30) + "=1", "run.x=1", "train.steps.x=1", "data.source.kind.x=1"),
    *("x=" + "y" * 120_000, "run=\udcff", "\udcff=1", "run=a\0b", "train={{ x }}", "train=[", "train=a: b"),
    *("train=--- 1", "train=&a [*a]", "train=" + "[" * 5000, "deepspeed=" + "{a: " * 30),
]  # fmt: skip


def words() -> list[str]:
    """What may stand for a value."""
    return [word for line in WORDS.strip().splitlines() for word in line.split(" | ")] + LONG


def bombs() -> Iterator[str]:
    """Small texts that stand for much: aliases of aliases, and as many values as a file can hold."""
    levels = (f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12))
    yield "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]", *levels])
    yield "\n".join(["a0: &a0 {x: y}", *(f"a{k}: &a{k} {{l: *a{k - 1}, r: *a{k - 1}}}" for k in range(1, 40))])
    yield "\n".join(
        ["a0: &a0 {x: y}", *(f"a{k}: &a{k} {{<<: [*a{k - 1}, *a{k - 1}], k{k}: *a{k - 1}}}" for k in range(1, 30))]
    )
    yield "a: &a " + "x" * 100_000 + "\nb: [" + ", ".join(["*a"] * 30_000) + "]"
    yield "[" + "1, " * (MOST_VALUES + 1) + "1]"
    yield "\n".join(f"k{k}: {k}" for k in range(MOST_VALUES // 2 - 10))
    yield "a: [" + "{}," * 15_000 + "]\nb: [" + "[]," * 15_000 + "]"


def recipes() -> Iterator[str]:
    """The valid recipe with something odd put in."""
    yield from (RECIPE.replace("nowhere/run", word) for word in words())
    yield from (RECIPE.replace("steps: 5", f"steps: {word}") for word in words()[::2])
    yield from (f"{RECIPE}deepspeed: {word}\n" for word in words()[1::2])
    yield RECIPE + next(bombs())
    for section in ("data", "model", "train", "optim", "head", "parallel", "logging"):
        yield from (f"{RECIPE}{section}: 1\n", RECIPE.replace(f"{section}:", f"{section}: 1\nx:"))
    yield from (RECIPE.replace(":", ""), RECIPE.replace(" ", ""), RECIPE[: len(RECIPE) // 2], RECIPE * 2, RECIPE[::-1])


@cache
def corpus() -> list[bytes]:
    """All files, in an order that mixes neither kinds nor runs."""
    keys = [key.replace(", ", "\n", 1) for line in KEYS.strip().splitlines() for key in line.split(" | ")]
    texts: list[str | bytes] = [*DOCUMENTS, *bombs(), *keys, *(f"a: {word}" for word in words()), *recipes()]
    texts += [f"kind: {kind}\nbase: {word}" for word in words() for kind in ("language", word)][::2]
    return [text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass") for text in texts]
