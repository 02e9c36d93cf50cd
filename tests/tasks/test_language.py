"""Language models' scores against transformers' own loss, and float64 by hand."""

import copy
import gc
import json
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selecting import combinations
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from ckptavg import Candidate, compare, evaluate, open_checkpoint
from ckptavg.averaging.compute import read_state_dict
from ckptavg.averaging.plan import plan_average
from ckptavg.data.token_windows import IGNORED, Windows
from ckptavg.errors import EvaluationError
from ckptavg.evaluation import session
from ckptavg.models.load import load_into
from ckptavg.runs.run import as_run
from ckptavg.specs.sources import make_model
from ckptavg.tasks import token_scores
from ckptavg.tasks.language import CausalLM
from ckptavg.tasks.token_scores import score_tokens

VOCABULARY = 29
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Bigrams(nn.Module):
    """Logits that depend on the token at hand: a plain module that takes the ids alone."""

    def __init__(self, vocabulary=VOCABULARY, seed=0):
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            self.table.weight.copy_(2 * torch.randn(vocabulary, vocabulary, generator=generator))

    def forward(self, ids):
        return self.table(ids)


def gpt2(seed=0, **settings):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2,
        initializer_range=0.5, bos_token_id=0, eos_token_id=0, **settings,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def llama(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        initializer_range=0.5, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens(count, seed=0):
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def windows(count=50, length=12, stride=None):
    return Windows(tokens(count), length, stride)


def predictions(task, model, batch):
    inputs, targets = task.split(batch)
    with torch.inference_mode():
        outputs = task.forward(model, inputs)
        task.check(outputs, targets)
        found = task.predict(outputs, targets)
    assert bool(task.is_finite(found))
    return found, targets


def scored(model, batches, task=None):
    task = task or CausalLM()
    scores = task.scores()
    for batch in batches:
        scores.update(*predictions(task, model, batch))
    return scores.compute()


def ensemble(models, batches, park_after=None):
    """The scores of an ensemble that is parked after so many members."""
    task = CausalLM()
    scores = task.scores()
    for batch in batches:
        mean = task.mean()
        for number, model in enumerate(models, 1):
            mean.add(*predictions(task, model, batch))
            if number == park_after:
                mean.offload()
                mean = copy.deepcopy(mean)  # a pass that fails begins anew with it
        value = mean.value()
        assert bool(task.is_finite(value))
        assert mean.members == len(models)
        scores.update(value, task.split(batch)[1])
    return scores.compute()


def by_hand(probabilities, goals):
    """Scores in float64 of (n, V) probabilities of which goals, (n,), come true."""
    picked = probabilities[np.arange(len(goals)), goals]
    nll = -np.log(picked).mean()
    right = (probabilities.argmax(1) == goals).mean()
    return {"nll": nll, "perplexity": np.exp(nll), "accuracy": 100 * right, "n": len(goals)}


def softmax(logits):
    exps = np.exp(logits - logits.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def probabilities_of(model, batch):
    """Float64 probabilities of the next tokens that are scored in a batch, and those tokens."""
    with torch.no_grad():
        logits = model.double()(batch["input_ids"])
    model.float()
    logits = getattr(logits, "logits", logits)
    goals = batch["labels"][:, 1:]
    kept = goals != IGNORED
    return softmax(logits[:, :-1][kept].numpy()), goals[kept].numpy()


def error_of(call, *args):
    with pytest.raises(EvaluationError) as caught:
        call(*args)
    return str(caught.value)


# Scores


@combinations(make=[gpt2, llama], stride=[None, 3], size=[1, 2, 100])
def test_causal_lm_nll_matches_transformers_loss(make, stride, size):
    """transformers shifts by itself, and gives the mean of a batch's scored tokens."""
    model, total, count = make(), 0.0, 0
    loader = DataLoader(windows(stride=stride), size)
    for batch in loader:
        with torch.no_grad():
            loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        n = int((batch["labels"][:, 1:] != IGNORED).sum())
        total, count = total + float(loss) * n, count + n
    found = scored(model, loader)
    assert found["n"] == count == 49
    assert found["nll"] == pytest.approx(total / count, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("make", [Bigrams, gpt2])
def test_causal_lm_scores_match_float64(make):
    model, data = make(), windows()
    probabilities, goals = probabilities_of(model, next(iter(DataLoader(data, 100))))
    found = scored(model, DataLoader(data, 2))
    assert list(found) == ["nll", "perplexity", "accuracy", "n"]
    assert found == pytest.approx(by_hand(probabilities, goals), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_lm_scores_reduced_logits_in_float32(dtype):
    """The logits are what they are; no further rounding comes in."""
    task, targets = CausalLM(), tokens(40, seed=1).reshape(4, 10)
    logits = (3 * torch.randn(4, 10, VOCABULARY, generator=torch.Generator().manual_seed(0))).to(
        dtype
    )
    scores = task.scores()
    scores.update(task.predict(logits, targets), targets)
    found = scores.compute()
    expected = nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    assert found["nll"] == pytest.approx(
        float(expected), rel=1e-14 if dtype.itemsize == 8 else 1e-6
    )


def test_causal_lm_scores_are_independent_of_batch_size():
    data, model = windows(200, 16, 5), gpt2()
    expected = scored(model, DataLoader(data, 1))
    for size in (2, 7, 100):
        assert scored(model, DataLoader(data, size)) == pytest.approx(expected, rel=1e-6)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(1, 70), st.booleans())
def test_score_tokens_is_independent_of_chunk_size(count, length, vocabulary, chunk, transposed):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, length, vocabulary, generator=generator)
    targets = torch.randint(-1, vocabulary, (count, length), generator=generator)
    if transposed:
        logits = logits.mT.contiguous().mT
    logs = logits.double().log_softmax(2).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    hits = logits.argmax(2) == targets
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_scores, "_CHUNK", chunk)
        found = score_tokens(logits, targets)
    assert found.dtype == torch.float64
    expected = torch.cat((torch.where(targets < 0, 0, logs), hits.double()), 1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_causal_lm_scores_depend_on_stride():
    model = gpt2()
    found = [scored(model, DataLoader(windows(stride=s), 4))["nll"] for s in (11, 3)]
    assert found[0] != pytest.approx(found[1], rel=1e-4)


def test_causal_lm_ignores_padding_of_last_window():
    model, data = gpt2(), windows(20, 12)
    last = data[len(data) - 1]
    short = {key: value[:9][None] for key, value in last.items()}
    padded = {key: value[None] for key, value in last.items()}
    assert int(last["labels"][8]) != IGNORED
    assert int(last["labels"][9]) == IGNORED
    assert scored(model, [padded]) == pytest.approx(scored(model, [short]), rel=1e-6)


def test_causal_lm_perplexity_may_be_infinite():
    logits = torch.zeros(1, 2, 3)
    logits[..., 0] = 2000
    found = scored(nn.Identity(), [], FixedLogits(logits, [[1, 2]]))
    assert found["nll"] == 2000
    assert found["perplexity"] == math.inf


class FixedLogits(CausalLM):
    """Starts with a batch of given logits taken in."""

    def __init__(self, logits, targets):
        super().__init__()
        self.given = logits, torch.tensor(targets)

    def scores(self):
        scores = super().scores()
        scores.update(self.predict(*self.given), self.given[1])
        return scores


# Batches


def test_causal_lm_takes_tuple_labels_as_shifted():
    """Both kinds of batch give one score of the same data, but for the token at windows' ends."""
    model, ids = Bigrams(), tokens(33)
    aligned = {"input_ids": ids[None], "labels": ids[None]}
    shifted = (ids[None, :-1], ids[None, 1:])
    assert scored(model, [shifted]) == pytest.approx(scored(model, [aligned]), rel=1e-12)


@pytest.mark.parametrize("ignored", [-100, -1])
def test_causal_lm_ignores_negative_labels(ignored):
    model, ids = Bigrams(), tokens(12)
    goals = ids[1:].clone()
    goals[4:] = ignored
    expected = scored(model, [(ids[None, :4], ids[None, 1:5])])
    assert scored(model, [(ids[None, :-1], goals[None])]) == pytest.approx(expected, rel=1e-12)


def test_causal_lm_passes_named_arguments_only():
    class Model(Bigrams):
        def forward(self, input_ids, attention_mask=None, use_cache=True):
            self.seen = attention_mask.tolist(), use_cache
            return (super().forward(input_ids), "more")

    model, ids = Model(), tokens(4)[None]
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones(1, 4), "source": "x"}
    assert scored(model, [batch])["n"] == 3
    assert model.seen == ([[1, 1, 1, 1]], False)


def test_causal_lm_takes_batch_encoding():
    from transformers import BatchEncoding

    ids = tokens(8)[None]
    batch = BatchEncoding({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
    assert scored(gpt2(), [batch])["n"] == 7


BAD_BATCHES = {
    "no labels": (
        {"input_ids": torch.ones(1, 3, dtype=int)},
        "no labels but input_ids. Labels are",
    ),
    "no ids": ({"tokens": torch.ones(1, 3)}, "no input_ids but tokens. Let the data give"),
    "a tensor": (torch.ones(2, 3, dtype=int), "but is a Tensor"),
    "one of a tuple": ((torch.ones(2, 3, dtype=int),), "but is a tuple"),
    "floats": ((torch.ones(2, 3), torch.ones(2, 3)), "batch[0] is expected to be a tensor of int"),
    "classes": ((torch.ones(2, 3, dtype=int), torch.ones(2, dtype=int)), "of shape (2,)"),
    "lists": ({"input_ids": [[1, 2]], "labels": [[1, 2]]}, "input_ids is expected to be a tensor"),
    "two lengths": (
        (torch.ones(2, 3, dtype=int), torch.ones(2, 4, dtype=int)),
        "one shape (N, T) but have (2, 3) and (2, 4)",
    ),
    "a negative token": ((torch.tensor([[3, -7]]), torch.tensor([[1, 2]])), "the token id -7"),
}


@pytest.mark.parametrize(("batch", "said"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_causal_lm_refuses_malformed_batch(batch, said):
    assert said in error_of(CausalLM().split, batch)


def test_causal_lm_refuses_misplaced_labels():
    ids = tokens(9)[None]
    assert "repeats x" in error_of(CausalLM().split, (ids, ids))
    shifted = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    assert "are one position before" in error_of(CausalLM().split, shifted)


@pytest.mark.parametrize("labels", [[[5, 5, 5]], [[-100, -100, 5]], [[-1, -1, -1]]])
def test_causal_lm_takes_ambiguous_labels(labels):
    ids, labels = torch.full((1, 3), 5), torch.tensor(labels)
    CausalLM().split((ids, labels))
    CausalLM().split({"input_ids": ids, "labels": labels})


# Outputs that cannot be


def test_causal_lm_refuses_logits_of_last_position_only():
    """As nanoGPT's model returns them where it gets no targets."""

    class Last(Bigrams):
        def forward(self, ids, targets=None):
            logits = super().forward(ids)
            return (logits if targets is not None else logits[:, [-1]]), None

    class Task(CausalLM):
        def forward(self, model, inputs):
            return model(inputs["input_ids"], inputs["input_ids"])

    batches = list(DataLoader(windows(), 3))
    message = error_of(scored, Last(), batches)
    assert "logits of shape (3, 1, 29), for one position only, but windows have 12" in message
    assert "`task=Task`" in message
    assert scored(Last(), batches, Task()) == scored(Bigrams(), batches)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((3, 29), "for one position only"),
        ((36, 29), "logits of shape (N, T, vocabulary) are expected"),
        ((3, 29, 12), "got (3, 29, 12) and (3, 12)"),
        ((3, 11, 29), "got (3, 11, 29) and (3, 12)"),
    ],
)
def test_causal_lm_refuses_outputs_of_other_shape(shape, said):
    targets = torch.zeros(3, 12, dtype=int)
    assert said in error_of(CausalLM().check, torch.zeros(shape), targets)


def test_causal_lm_refuses_outputs_without_logits():
    assert "returned a dict" in error_of(
        CausalLM().check, {"loss": 1}, torch.zeros(1, 2, dtype=int)
    )


def test_causal_lm_scores_windows_of_one_position():
    ids = torch.tensor([[3], [5]])
    assert scored(Bigrams(), [(ids, torch.tensor([[4], [6]]))])["n"] == 2


def test_causal_lm_names_token_id_beyond_embedding():
    batch = (torch.tensor([[1, 40, 2]]), torch.tensor([[40, 2, 3]]))
    message = error_of(scored, gpt2(), [batch])
    assert "the token id 40, but the model has 29 embeddings" in message
    assert "tokenizer" in message


def test_causal_lm_names_token_id_beyond_plain_embedding():
    message = error_of(scored, Bigrams(), [(torch.tensor([[1, 40]]), torch.tensor([[1, 2]]))])
    assert "fails on windows of 2 tokens with ids up to 40" in message


def test_causal_lm_names_token_id_beyond_logits():
    batch = (torch.tensor([[1, 2]]), torch.tensor([[2, 40]]))
    assert "the token id 40, but the model has 29 tokens" in error_of(scored, Bigrams(), [batch])


def test_causal_lm_refuses_windows_beyond_context():
    message = error_of(scored, gpt2(), DataLoader(windows(100, 40), 2))
    assert "fails on windows of 40 tokens" in message
    assert "the length of the windows" in message


@pytest.mark.parametrize(
    ("value", "sound"), [(math.nan, False), (math.inf, False), (-math.inf, True)]
)
def test_causal_lm_allows_minus_infinity_but_not_nan(value, sound):
    task, logits = CausalLM(), torch.zeros(2, 3, 4)
    logits[1, 1, 2] = value
    targets = torch.zeros(2, 3, dtype=int)
    assert bool(task.is_finite(task.predict(logits, targets))) == sound
    targets[1, 1] = IGNORED
    assert bool(task.is_finite(task.predict(logits.clone(), targets)))  # where nothing is scored


def test_causal_lm_finds_impossible_target():
    logits, targets = torch.zeros(1, 2, 4), torch.tensor([[1, 3]])
    logits[0, 1, 3] = -math.inf
    task = CausalLM()
    assert not bool(task.is_finite(task.predict(logits, targets)))


def test_causal_lm_refuses_data_without_tokens_to_score():
    ids = torch.zeros(1, 1, dtype=int)
    assert "no tokens to score" in error_of(scored, Bigrams(), [{"input_ids": ids, "labels": ids}])
    assert "no tokens to score" in error_of(scored, Bigrams(), [])


# Ensembles


@pytest.mark.parametrize("make", [Bigrams, gpt2])
@pytest.mark.parametrize("members", [1, 2, 5])
def test_causal_lm_ensemble_averages_probabilities(make, members):
    models, data = [make(seed=seed) for seed in range(members)], windows(stride=7)
    found = [probabilities_of(m, next(iter(DataLoader(data, 100)))) for m in models]
    expected = by_hand(np.mean([p for p, _ in found], 0), found[0][1])
    assert ensemble(models, DataLoader(data, 3)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("park_after", [1, 2, 4, 5])
def test_causal_lm_ensemble_loses_accuracy_when_parked(park_after, caplog):
    caplog.set_level("INFO", "ckptavg")
    models, batches = [Bigrams(seed=s) for s in range(5)], list(DataLoader(windows(stride=7), 3))
    expected = ensemble(models, batches)
    del expected["accuracy"]
    caplog.clear()
    assert ensemble(models, batches, park_after) == pytest.approx(expected, rel=1e-6)
    assert [record.message for record in caplog.records] == [
        "the accuracy of an ensemble whose members came in several passes is unknown"
    ]


def test_causal_lm_ensemble_is_small_when_parked():
    task, ids = CausalLM(), tokens(8)[None]
    mean = task.mean()
    mean.add(*predictions(task, Bigrams(), (ids[:, :-1], ids[:, 1:])))
    mean.offload()
    kept = [v for v in vars(mean).values() if isinstance(v, torch.Tensor)]
    assert max(v.numel() for v in kept) == 7


def test_causal_lm_ensemble_leaves_predictions_unchanged():
    task, ids = CausalLM(), tokens(8)[None]
    found, targets = predictions(task, Bigrams(), (ids[:, :-1], ids[:, 1:]))
    before, mean = found.clone(), task.mean()
    for _ in range(3):
        mean.add(found, targets)
    mean.value()
    assert torch.equal(found, before)


def test_causal_lm_ensemble_averages_tiny_probabilities():
    """Two members that both hold the target for as likely as e^-200, and e^-201."""
    task, targets = CausalLM(), torch.zeros(1, 1, dtype=int)
    mean = task.mean()
    for least in (-200.0, -201.0):
        logits = torch.tensor([[[least, 0.0]]])
        mean.add(task.predict(logits, targets), targets)
    expected = math.log((math.exp(-200) + math.exp(-201)) / 2)
    assert float(mean.value()[0, 0]) == pytest.approx(expected, rel=1e-6)


def test_causal_lm_ensemble_refuses_no_members():
    assert "no members" in error_of(CausalLM().mean().value)


# Several processes, and pairs


def test_causal_lm_states_of_processes_merge_through_json():
    model, batches = gpt2(), list(DataLoader(windows(120, 12, 5), 2))
    task, merged = CausalLM(), CausalLM().scores()
    for rank in range(3):
        scores = task.scores()
        for batch in batches[rank::3]:
            scores.update(*predictions(task, model, batch))
        merged.merge(json.loads(json.dumps(scores.state(), allow_nan=False)))
    assert merged.compute() == pytest.approx(scored(model, batches), rel=1e-12)


def test_causal_lm_state_without_accuracy_merges():
    task = CausalLM()
    targets = torch.tensor([[1, 2]])
    mean, scores, merged = task.mean(), task.scores(), task.scores()
    mean.add(task.predict(torch.zeros(1, 2, 4), targets), targets)
    mean.offload()
    scores.update(mean.value(), targets)
    merged.merge(json.loads(json.dumps(scores.state(), allow_nan=False)))
    assert merged.compute() == pytest.approx({"nll": math.log(4), "perplexity": 4, "n": 2})


@pytest.mark.parametrize("parked", [False, True])
def test_causal_lm_samples_are_windows(parked):
    task, model, data = CausalLM(), gpt2(), windows(50, 12, 7)
    found, targets = predictions(task, model, next(iter(DataLoader(data, 100))))
    if parked:
        mean = task.mean()
        mean.add(found, targets)
        mean.offload()
        found = mean.value()
    samples = task.samples(found, targets)
    assert samples.answers is None
    for number in range(len(data)):
        batch = {key: value[None] for key, value in data[number].items()}
        one = scored(model, [batch])
        assert float(samples.weights[number]) == one["n"]
        assert float(samples.values[number]) == pytest.approx(one["nll"] * one["n"], rel=1e-5)
    assert float(samples.values.sum() / samples.weights.sum()) == pytest.approx(
        scored(model, DataLoader(data, 4))["nll"], rel=1e-6
    )


# Memory


class Watch(TorchDispatchMode):
    """Notes the storage that each operation newly gives."""

    def __init__(self):
        super().__init__()
        self.largest = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in found if isinstance(found, (list, tuple)) else [found]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() not in given
            ):
                size = max(self.largest.get(tensor.dtype, 0), tensor.untyped_storage().nbytes())
                self.largest[tensor.dtype] = size
        return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_causal_lm_scoring_holds_little_beside_logits(monkeypatch, dtype):
    """An ensemble holds one sum in float32; nothing of the size is held in float64."""
    monkeypatch.setattr(token_scores, "_CHUNK", 1000)
    task, targets = CausalLM(), torch.zeros(8, 64, dtype=int)
    logits = torch.randn(8, 64, 100).to(dtype)
    with Watch() as watch:
        found = task.predict(logits, targets)
        scores = task.scores()
        scores.update(found, targets)
        task.samples(found, targets)
        task.is_finite(found)
    assert watch.largest[torch.float32] <= 4 * max(1000, 2 * targets.numel())
    assert watch.largest[torch.float64] == 8 * 2 * targets.numel()
    with Watch() as watch:
        mean = task.mean()
        mean.add(found, targets)
        mean.add(found, targets)
        scores.update(mean.value(), targets)
    assert watch.largest[torch.float32] == 4 * logits.numel()
    assert watch.largest[torch.float64] == 8 * 2 * targets.numel()


def test_causal_lm_scores_logits_once_for_all_uses(monkeypatch):
    task, calls = CausalLM(), []
    monkeypatch.setattr(
        token_scores, "score_tokens", lambda *args: calls.append(args) or score_tokens(*args)
    )
    ids = tokens(8)[None]
    found, targets = predictions(task, Bigrams(), (ids[:, :-1], ids[:, 1:]))
    for _ in range(2):
        task.scores().update(found, targets)
        task.samples(found, targets)
    assert len(calls) == 1


def test_causal_lm_releases_logits_and_scores():
    task, ids = CausalLM(), tokens(8)[None]
    found, targets = predictions(task, Bigrams(), (ids[:, :-1], ids[:, 1:]))
    logits, scores = weakref.ref(found), weakref.ref(task._token_scorer.score(found, targets))
    del found
    gc.collect()
    assert logits() is None
    assert scores() is None


def test_causal_lm_tasks_share_no_scores(monkeypatch):
    calls = []
    monkeypatch.setattr(
        token_scores, "score_tokens", lambda *args: calls.append(args) or score_tokens(*args)
    )
    logits, targets = torch.randn(2, 3, 5), torch.ones(2, 3, dtype=int)
    for task in (CausalLM(), CausalLM()):
        task.predict(logits, targets)
    assert len(calls) == 2


def test_causal_lm_copied_mean_scores_logits_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        token_scores, "score_tokens", lambda *args: calls.append(args) or score_tokens(*args)
    )
    task, targets = CausalLM(), torch.ones(2, 3, dtype=int)
    logits = task.predict(torch.randn(2, 3, 5), targets)
    mean = task.mean()
    mean.add(logits, targets)
    mean.offload()
    calls.clear()
    more = task.predict(torch.randn(2, 3, 5), targets)
    copy.deepcopy(mean).add(more, targets)
    assert len(calls) == 1


# Checkpoints of transformers


@pytest.mark.parametrize("make", [gpt2, llama])
def test_causal_lm_scores_saved_model_as_it_was(tmp_path, make):
    """GPT-2's output layer is tied to its embedding, so it is not in the file."""
    model, loader = make(seed=7), DataLoader(windows(), 4)
    model.save_pretrained(tmp_path / "checkpoint-10")
    built = make_model(f"hf:{tmp_path / 'checkpoint-10'}").eval()
    assert scored(built, loader)["nll"] != pytest.approx(scored(model, loader)["nll"], rel=1e-3)
    checkpoint = open_checkpoint(tmp_path / "checkpoint-10")
    load_into(built, read_state_dict(checkpoint), "checkpoint-10")
    assert scored(built, loader) == scored(model, loader)


@pytest.mark.parametrize("at_a_time", [1, 2, 5])
def test_evaluate_scores_causal_lm_in_any_group_size(tmp_path, monkeypatch, at_a_time):
    """Two checkpoints, their average and their ensemble, whose accuracy needs one pass."""
    monkeypatch.setattr(session, "count_models_that_fit", lambda *_: at_a_time)
    models, data = [Bigrams(seed=seed) for seed in range(2)], windows(60, 9, 4)
    paths = [tmp_path / f"{i}.pt" for i in range(2)]
    for model, path in zip(models, paths, strict=True):
        torch.save(model.state_dict(), path)
    run = as_run([open_checkpoint(path) for path in paths])
    candidates = [
        *paths,
        Candidate.of_average(plan_average(run, "uniform"), "average", recompute=False),
        Candidate.of_ensemble(run),
    ]
    found = evaluate(candidates, Bigrams(), data, task=CausalLM(), batch_size=3)

    mean = Bigrams()
    mean.table.weight.data = torch.stack([m.table.weight.data for m in models]).mean(0)
    batch = next(iter(DataLoader(data, 100)))
    parts = [probabilities_of(model, batch) for model in (*models, mean)]
    everything = [p for p, _ in parts] + [np.mean([p for p, _ in parts[:2]], 0)]
    expected = [by_hand(probabilities, parts[0][1]) for probabilities in everything]
    if at_a_time == 1:
        del expected[3]["accuracy"]
    assert [r.metrics for r in found] == [pytest.approx(e, rel=1e-6) for e in expected]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("park_after", [None, 1])
def test_causal_lm_scores_match_on_gpu(park_after):
    models, data = [gpt2(seed=seed) for seed in range(2)], DataLoader(windows(stride=7), 3)
    expected = ensemble(models, data, park_after)
    there = [{key: value.cuda() for key, value in batch.items()} for batch in data]
    found = ensemble([model.cuda() for model in models], there, park_after)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("call", [evaluate, compare], ids=["evaluate", "compare"])
def test_evaluate_and_compare_take_causal_lm_by_name(call, tmp_path):
    rows = torch.arange(24).view(4, 6) % VOCABULARY
    for step in (1, 2):
        torch.save(Bigrams(seed=step).state_dict(), tmp_path / f"step_{step}.pt")
    run, data = as_run(tmp_path), [(rows[:, :-1], rows[:, 1:])]
    by_name, made = (call(run, Bigrams(), data, task=t) for t in ("causal-lm", CausalLM()))
    assert [r.metrics for r in by_name] == [r.metrics for r in made]
    assert by_name[0].metrics["n"] == 20


def test_evaluate_suggests_causal_lm_for_token_outputs(tmp_path):
    torch.save(Bigrams().state_dict(), tmp_path / "a.pt")
    ids = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(EvaluationError, match="Pass `task='causal-lm'` if this is a language"):
        evaluate([tmp_path / "a.pt"], Bigrams(), [(ids, ids)])
