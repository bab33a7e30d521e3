"""Serving on several devices: what one device answers, prompts shared out over copies, layers over those of one copy."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counted
from tiny_policies import tiny_config, varied_params
from tiny_runs import MODEL, REWARDS, make_data, make_steerable, make_supervised

from clp_jax.evaluate import evaluate
from clp_jax.models.config import MoEConfig, PaLMConfig
from clp_jax.models.policy import Policy
from clp_jax.nn.routing import Dropless
from clp_jax.partitioning import MESH_AXES, active_mesh, tree_shardings, use_mesh
from clp_jax.sample import sample
from clp_jax.sampling.beam_search import BeamConfig, beam_search
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.decoding import Decoding
from clp_jax.sampling.devices import RULES, Devices
from clp_jax.sampling.engine import Engine, EngineConfig, Request
from clp_jax.sampling.generate import SamplingConfig, generate, request_keys
from clp_jax.sampling.strategies import Sampling
from clp_jax.score import score
from clp_jax.training.policies import load_policy

SIZES = dict(vocab_size=16, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4)
POLICIES = {
    "encoder-decoder": tiny_config(vocab_size=16, num_encoder_layers=1, num_decoder_layers=1),
    "scanned windows": PaLMConfig.llama(**SIZES, num_layers=6, num_kv_heads=2, window=3, window_pattern=(True, False)),
    "experts": PaLMConfig.llama(**SIZES, num_layers=1, moe=MoEConfig(num_experts=4, router=Dropless())),
}
LAYOUTS = {"copies": Devices(replicas=4), "copies of two": Devices(tensor=2, replicas=4)}
RNG = np.random.default_rng(0)
PROMPTS = [tuple(int(t) for t in RNG.integers(2, 16, size)) for size in (3, 7, 1, 12, 5, 2, 9)]
SAMPLING = SamplingConfig(8, Sampling(top_k=12))


def _padded(rows):
    out = np.zeros((len(rows), 16), np.int32)
    for row, prompt in zip(out, rows, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(out)


@pytest.fixture(scope="module", params=POLICIES.values(), ids=POLICIES)
def policy(request):
    return Policy(request.param)


@pytest.fixture(scope="module")
def params(policy):
    return varied_params(policy)


@pytest.fixture(scope="module")
def alone(policy, params):
    """Every request on one device."""

    @jax.jit
    def run(params, inputs, seeds):
        keys = request_keys(seeds, 2)
        return generate(CachedDecoder(policy.bind(params)), inputs, keys=keys, config=SAMPLING, num_samples=2)

    out = run(params, _padded(PROMPTS), jnp.arange(len(PROMPTS), dtype=jnp.uint32))
    lengths = np.asarray(out.mask).sum(-1).astype(int)
    return [
        (tuple(np.asarray(out.tokens)[row, :length].tolist()), np.asarray(out.log_probs)[row, :length])
        for row, length in enumerate(lengths)
    ]


def _placed(policy, params):
    """On the active mesh."""
    return jax.device_put(params, tree_shardings(policy.logical_axes(), active_mesh(), RULES, params))


@pytest.mark.parametrize("devices", LAYOUTS.values(), ids=LAYOUTS)
def test_slots_are_shared_out(policy, params, alone, devices):
    """The tokens of one device; each program is compiled once; keys lie on their rows' and heads' devices, and stay there."""

    def bind(params):
        return CachedDecoder(policy.bind(params))

    config = EngineConfig(SAMPLING, buckets=(16,), slots=4, num_samples=2, chunk=3, prefill=4)
    with devices.use(rows=4):
        placed = _placed(policy, params)
        with counted() as programs:
            engine = Engine(bind, placed, config)
            numbers = {engine.submit(Request(p, seed=i, num_samples=2)): i for i, p in enumerate(PROMPTS)}
            found = {numbers[result.number]: result.samples for result in engine.run()}
        keys = engine._device.state.stacks[0][0].keys
    assert sorted(found) == list(range(len(PROMPTS)))
    for i, samples in found.items():
        for one, (tokens, log_probs) in zip(samples, alone[2 * i : 2 * i + 2], strict=True):
            assert one.tokens == tokens
            np.testing.assert_allclose(one.log_probs, log_probs, rtol=0, atol=1e-5)
    assert len(programs) == 3  # Empty slots, prompts, tokens.
    assert keys.addressable_shards[0].data.size == keys.size // (devices.replicas * devices.tensor)


def test_copies_tell_each_other_only_whether_they_are_done(policy, params):
    """Of all that decoding computes: one bit for each token."""
    beams = BeamConfig(6, 4)

    def searched(params, inputs):
        return beam_search(CachedDecoder(policy.bind(params)), inputs, beams).completions

    def sampled(params, inputs):
        keys = request_keys(jnp.arange(4, dtype=jnp.uint32), 2)
        return generate(CachedDecoder(policy.bind(params)), inputs, keys=keys, config=SAMPLING, num_samples=2)

    for function in (searched, sampled):
        with Devices(replicas=4).use(rows=4):
            program = jax.jit(function).lower(_placed(policy, params), _padded(PROMPTS[:4])).compile()
            out = program(_placed(policy, params), _padded(PROMPTS[:4]))
        exchanged = re.findall(
            r"= (\S+) (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\(", program.as_text()
        )
        assert exchanged == ["pred[]"]
        plain = jax.jit(function)(params, _padded(PROMPTS[:4]))
        np.testing.assert_array_equal(out.tokens, plain.tokens)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a run of an encoder-decoder and prompts."""
    home = tmp_path_factory.mktemp("serving")
    make_supervised(home / "run", make_data(home / "data"), MODEL)
    lines = [{"inputs": list(prompt), "targets": list(prompt[::-1])} for prompt in PROMPTS]
    (home / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


def test_a_checkpoint_is_read_where_its_devices_need_it(home):
    plain = load_policy(home / "run")
    with Devices(tensor=2, replicas=2).use(rows=4):
        shared = load_policy(home / "run")
    axes = plain.policy.logical_axes()
    with use_mesh(*_mesh(tensor=2, replicas=2)):
        wanted = tree_shardings(axes, active_mesh(), RULES, plain.params)
    assert jax.tree.map(lambda x: x.sharding.spec, shared.params) == jax.tree.map(lambda s: s.spec, wanted)
    jax.tree.map(np.testing.assert_array_equal, shared.params, plain.params)


def _mesh(**sizes):
    with Devices(**sizes).use(rows=4):
        return active_mesh(), RULES


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("strategy", ["sample", "beam"])
def test_files_are_completed_on_all_devices(home, strategy):
    """Seven lines on four copies of two devices: the last slot is nobody's."""
    found = {}
    for name, devices in {"one": Devices(replicas=1), "eight": Devices(tensor=2), "eight copies": Devices()}.items():
        output = home / f"{strategy} {name}.jsonl"
        sample(
            checkpoint=str(home / "run"),
            input=str(home / "lines.jsonl"),
            output=str(output),
            decoding=Decoding(strategy=strategy, max_tokens=6),
            batch_size=8,
            max_prompt=16,
            devices=devices,
        )
        found[name] = _lines(output)
    assert [line["tokens"] for line in found["eight"]] == [line["tokens"] for line in found["one"]]
    assert [line["tokens"] for line in found["eight copies"]] == [line["tokens"] for line in found["one"]]
    assert any(line["tokens"] for line in found["one"])


def test_files_are_scored_on_all_devices(home):
    found = {}
    for name, devices in {"one": Devices(replicas=1), "eight": Devices(tensor=2)}.items():
        output = home / f"scores {name}.jsonl"
        score(
            checkpoint=str(home / "run"),
            input=str(home / "lines.jsonl"),
            output=str(output),
            batch_size=8,
            max_prompt=16,
            devices=devices,
        )
        found[name] = _lines(output)
    for one, eight in zip(found["one"], found["eight"], strict=True):
        np.testing.assert_allclose(eight["logprobs"], one["logprobs"], rtol=0, atol=1e-5)


def test_sweeps_generate_on_all_devices(home):
    """A policy of two components, mixed where they lie: the completions and KL divergences of one device."""

    def differing(params, k):
        rng = np.random.default_rng(k)
        return jax.tree.map(lambda p: np.asarray(p + 0.3 * rng.normal(size=p.shape), np.float32), params)

    path = make_steerable(home, "steerable", differing, sft="run")
    given = dict(data_dir=str(home / "data"), rewards=REWARDS, num_prompts=8, batch_size=4, resolution=2)
    one, eight = (
        evaluate(checkpoint=str(path), output=str(home / f"{number}.json"), devices=devices, **given)
        for number, devices in enumerate((Devices(replicas=1), Devices(tensor=2)))
    )
    assert [e.completions for e in eight.examples] == [e.completions for e in one.examples]
    kl = [[point.kl.mean for point in sweep.points] for sweep in (one, eight)]
    np.testing.assert_allclose(kl[1], kl[0], rtol=1e-5)
    assert min(kl[0]) > 0.1


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (Devices(tensor=9), "tensor is 9: expected 1 to 8, the devices there are"),
        (Devices(tensor=2, replicas=5), "replicas is 5: expected 1 to 4, as the 8 devices are, 2 a copy"),
        (Devices(replicas=5), r"replicas is 5: expected a divisor of the 32 prompts at once \(batch_size\)"),
    ],
)
def test_devices_that_are_not_there_are_refused(devices, message):
    with pytest.raises(ValueError, match=message), devices.use(rows=32):
        pass


def test_a_lone_prompt_is_answered_by_one_copy():
    with Devices().use(rows=1):
        assert active_mesh() is None
    with Devices(tensor=4).use(rows=1):
        assert dict(active_mesh().shape) == dict.fromkeys(MESH_AXES, 1) | {"tensor": 4}
    with Devices().use(rows=12):
        assert active_mesh().shape["data"] == 4
