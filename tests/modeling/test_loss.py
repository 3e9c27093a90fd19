"""The loss that is fused with the head: the plain loss and gradients, without the logits of all tokens."""

import copy
import sys
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jnana.modeling import loss_jnana
from jnana.modeling.loss_jnana import head_loss, unfused_reason
from tests.modeling.packed import batches, difference, loss_and_gradients
from tests.modeling.pairs import FAMILIES, join


EXACT = 1e-6  # relative
TOKENS, WIDTH, WORDS = 70, 24, 50
CROSS_ATTENTION = {"fusion": "cross_attention", "projector_type": "perceiver", "projector_num_latents": 3}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """16 tokens a chunk, the least there is."""
    monkeypatch.setattr(loss_jnana, "CHUNK_ELEMENTS", 1)


def make(bias: bool = True, dtype: torch.dtype = torch.float32):
    """A head, hidden states and labels, every seventh of which is ignored."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, WORDS, bias=bias, dtype=dtype)
    labels = torch.randint(WORDS, (TOKENS,))
    labels[::7] = -100
    return head, torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True), labels


def plain_loss(hidden_states, head, labels, num_items=None):
    """As transformers' `ForCausalLMLoss`."""
    logits = head(hidden_states).float()
    if num_items is None:
        return cross_entropy(logits, labels)
    return cross_entropy(logits, labels, reduction="sum") / num_items


def worst(loss, expected, inputs) -> float:
    """The largest relative difference of the loss and of its gradients, which arrive three times as large."""
    gradients = [torch.autograd.grad(3 * each, inputs) for each in (loss, expected)]
    pairs = [(loss.detach(), expected.detach()), *zip(*gradients, strict=True)]
    return max(float((ours.float() - theirs.float()).norm() / theirs.float().norm()) for ours, theirs in pairs)


@pytest.mark.parametrize("num_items", [None, 90, torch.tensor(90)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_the_plain_ones(bias, num_items):
    head, hidden_states, labels = make(bias)
    inputs = [hidden_states, *head.parameters()]
    ours, theirs = (of(hidden_states, head, labels, num_items) for of in (head_loss, plain_loss))
    assert ours.dtype == torch.float32 and worst(ours, theirs, inputs) < EXACT


@pytest.mark.parametrize("fault", ["bias", "last chunk", "ignored", "count"])
def test_faults_are_noticed(fault, monkeypatch):
    """The controls: what breaks the equality above."""
    head, hidden_states, labels = make()
    inputs = [hidden_states, *head.parameters()]
    expected, count = plain_loss(hidden_states, head, labels, 90), 90
    if fault == "bias":
        ours = head_loss(hidden_states, nn.Linear(WIDTH, WORDS), labels, count)
        inputs = [hidden_states]
    elif fault == "last chunk":  # of six tokens
        ours = head_loss(hidden_states[:-6], head, labels[:-6], count)
    elif fault == "ignored":
        ours = head_loss(hidden_states, head, labels.clamp(min=0), count)
    else:
        ours = head_loss(hidden_states, head, labels)
    assert worst(ours, expected, inputs) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("held", ["autocast", "all"])
def test_in_16_bits(dtype, held):
    """As close to float32 as the plain loss in 16 bits is; a small loss scale loses nothing that it keeps."""
    head, hidden_states, labels = make()
    inputs = [hidden_states, *head.parameters()]
    expected = torch.autograd.grad(plain_loss(hidden_states, head, labels), inputs)
    if held == "all":
        head.to(dtype)
        inputs = [hidden_states.detach().to(dtype).requires_grad_(), *head.parameters()]
    errors = []
    for of in (head_loss, plain_loss):
        with torch.autocast("cpu", dtype, enabled=held == "autocast"):
            loss = of(inputs[0], head, labels)
        found = torch.autograd.grad(loss, inputs)
        assert [gradient.dtype for gradient in found] == [tensor.dtype for tensor in inputs]
        errors.append([float((a.float() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)])
    assert all(ours < 1.5 * theirs + 1e-4 for ours, theirs in zip(*errors, strict=True)), errors


def test_a_frozen_head_gets_no_gradient():
    head, hidden_states, labels = make()
    head.requires_grad_(False)
    head_loss(hidden_states, head, labels).backward()
    assert head.weight.grad is None and head.bias.grad is None
    assert (
        worst(head_loss(hidden_states, head, labels), plain_loss(hidden_states, head, labels), [hidden_states]) < EXACT
    )
    head.weight.requires_grad_(True)
    head_loss(hidden_states.detach(), head, labels).backward()  # nothing below the head trains
    theirs = torch.autograd.grad(plain_loss(hidden_states, head, labels), head.weight)[0]
    torch.testing.assert_close(head.weight.grad, theirs, rtol=1e-5, atol=1e-7)
    assert head.bias.grad is None


def test_without_a_gradient_and_twice():
    head, hidden_states, labels = make()
    with torch.no_grad():
        loss = head_loss(hidden_states, head, labels)
    torch.testing.assert_close(loss, plain_loss(hidden_states, head, labels).detach())
    assert not loss.requires_grad
    loss = head_loss(hidden_states, head, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(
        RuntimeError, match="`backward` can be called only once. Call the model with `skip_logits=False`"
    ):
        loss.backward()


# ---------------------------------------------------------------------- in the model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """
    Pairs that train whole, in training mode and without dropout; made when first asked for. In double precision: below
    the loss, a random network turns differences of 1e-7 into some of 1e-6.
    """
    made = {}

    def of(family: str, **fields):
        key = (family, *fields)
        if key not in made:
            made[key] = join(tmp_path_factory.mktemp(family), family, **fields).double()
        return made[key].requires_grad_(True).train()

    return of


def double(how: str, **sizes) -> list[dict]:
    inputs = batches(how, **sizes)
    return [{**micro, "pixel_values": micro["pixel_values"].double()} for micro in inputs]


def skipping(inputs: list[dict]) -> list[dict]:
    return [{**micro, "skip_logits": True} for micro in inputs]


@pytest.mark.parametrize("fields", [{}, CROSS_ATTENTION], ids=["tokens", "cross_attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_trains_the_same(models, family, fields):
    """Whole, with tied heads (Qwen) too; then with a frozen head."""
    model = models(family, **fields)
    inputs = double("shared_image", **({"size": 1} if fields else {}))
    for trains in (True, False):
        model.get_output_embeddings().requires_grad_(trains)
        expected = loss_and_gradients(model, inputs)
        assert ("lm_head.weight" in expected[1] or model.config.tie_word_embeddings) or not trains
        found = loss_and_gradients(model, skipping(inputs))
        assert difference(found, expected) < EXACT
    wrong = skipping(inputs)
    wrong[0]["logit_positions"] = wrong[0]["logit_positions"][:-1]  # the control
    assert difference(loss_and_gradients(model, wrong), expected) > 1e-3


def test_logits_are_left_out_only_when_asked_for_and_only_in_training(models):
    model = models("phi")
    [inputs] = double("shared_image")
    assert model(**inputs).logits is not None  # not asked for
    skipped = model(**inputs, skip_logits=True, return_dict=True)
    assert skipped.logits is None and skipped.to_tuple()[0] is skipped.loss
    without = {name: value for name, value in inputs.items() if "label" not in name}
    assert model(**without, skip_logits=True).logits is not None  # no loss
    model.eval()
    evaluated = model(**inputs, skip_logits=True)
    torch.testing.assert_close(evaluated.loss, skipped.loss)
    assert evaluated.logits.shape == (len(inputs["logit_positions"]), 320)


@pytest.mark.parametrize("how", ["labels", "shift_labels", "last logits", "mask"])
def test_the_loss_of_all_forms_of_labels(models, how):
    model = models("phi")
    [inputs] = double("padded")
    shifted = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    if how == "mask":
        inputs["logits_to_keep"] = shifted != -100
    elif how != "labels":
        inputs["shift_labels"] = shifted
    if how == "last logits":
        inputs |= {"shift_labels": shifted[:, 1:].contiguous(), "logits_to_keep": shifted.shape[1] - 1}
    expected = loss_and_gradients(model, [inputs])
    assert difference(loss_and_gradients(model, skipping([inputs])), expected) < EXACT


@pytest.mark.parametrize("head", ["lora", "modules_to_save", "device map", "hook", "own loss", "compiled"])
def test_any_other_head_computes_its_logits(models, head, monkeypatch, caplog):
    """The plain path, named in the log once; the loss is the same."""
    model = models("phi")
    inputs = double("shared_image")
    expected = loss_and_gradients(model, skipping(inputs))[0]
    reason = {
        "lora": "the head is a Linear, so it is adapted",
        "modules_to_save": "the head is a ModulesToSaveWrapper",
        "device map": "a device map places the head",
        "hook": "the head has hooks",
        "own loss": "the model has a loss function of its own",
    }
    ran = model
    calls = []
    monkeypatch.setattr("jnana.modeling.modeling_jnana.head_loss", lambda *args: calls.append(args))
    loss_jnana.log_unfused.cache_clear()
    if head == "lora":
        ran = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    elif head == "modules_to_save":
        ran = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    elif head == "hook":
        hook = model.lm_head.register_forward_pre_hook(lambda *_: None)
    elif head == "device map":
        monkeypatch.setitem(vars(model.lm_head), "forward", model.lm_head.forward)
    elif head == "own loss":
        original = model.loss_function
        model.loss_function = lambda **given: original(**given)
    else:
        ran = torch.compile(model, backend="eager")
    try:
        with caplog.at_level("INFO"):
            for _ in range(2):
                output = ran(**inputs[0], skip_logits=True)
    finally:
        if head in ("lora", "modules_to_save"):
            model.lm_head = ran.unload().lm_head
        if head == "hook":
            hook.remove()
        model.loss_function = None
        del model._loss_function
    assert not calls and output.logits is None
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    if head in reason:
        assert (
            caplog.text.count("the loss computes all logits of a batch at once") == 1 and reason[head] in caplog.text
        )


def test_the_losses_of_tokens():
    """They come with the loss, which stays as it is, and carry no gradient."""
    head, hidden_states, labels = make()
    loss, losses = head_loss(hidden_states, head, labels, 90, return_token_losses=True)
    assert torch.equal(loss, head_loss(hidden_states, head, labels, 90)) and not losses.requires_grad
    expected = cross_entropy(head(hidden_states), labels, reduction="none")
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(loss_jnana.token_losses(head(hidden_states), labels), expected.detach())
    assert losses[::7].eq(0).all() and losses[1:7].gt(0).all()
    assert worst(loss, plain_loss(hidden_states, head, labels, 90), [hidden_states, *head.parameters()]) < EXACT


@pytest.mark.parametrize("fused", [True, False])
def test_a_model_gives_the_losses_of_its_tokens(models, fused):
    model = models("phi")
    (inputs, *_) = double("shared_image")
    hook = None if fused else model.lm_head.register_forward_pre_hook(lambda *_: None)
    try:
        output = model(**inputs, skip_logits=True, return_token_losses=True)
    finally:
        if hook is not None:
            hook.remove()
    number = len(inputs["logit_positions"])
    assert output.token_losses.shape == (number,) and output.logits is None
    assert output.token_losses.mean().item() == pytest.approx(output.loss.item(), rel=1e-5)
    assert model(**inputs, skip_logits=True).token_losses is None


def test_weights_that_are_not_there_are_not_read():
    """Stand-ins for what FSDP2 and ZeRO-3 leave in a head that is a unit of its own."""
    head = nn.Linear(2, 3)
    assert unfused_reason(head) is None
    head.weight.ds_id = 7
    assert unfused_reason(head) == "ZeRO-3 partitions the weight of the head"

    class Sharded(nn.Parameter):
        pass

    head.weight = Sharded(torch.zeros(3, 2))
    assert unfused_reason(head) == "a weight of the head is a Sharded"
    assert "is a Bilinear" in unfused_reason(nn.Bilinear(1, 1, 1))


@pytest.mark.parametrize("apart", [False, True], ids=["of the whole model", "a unit of its own"])
def test_a_head_that_fsdp_shards(tmp_path, monkeypatch, apart):
    """Fused where `forward` of the model finds it gathered; accelerate makes it a unit of its own: not fused."""
    model = join(tmp_path).double().train()
    inputs = double("shared_image")
    expected = loss_and_gradients(model, inputs)
    calls = []
    monkeypatch.setattr(
        "jnana.modeling.modeling_jnana.head_loss", lambda *args: calls.append(args) or head_loss(*args)
    )
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for unit in [*model.model.language_model.layers, *[model.lm_head] * apart, model]:
            fully_shard(unit, mesh=mesh)
        for _ in range(2):
            loss, gradients = loss_and_gradients(model, skipping(inputs))
        whole = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    finally:
        torch.distributed.destroy_process_group()
    assert difference((loss, whole), expected) < EXACT
    assert len(calls) == (0 if apart else 2)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in tree_leaves(made) if isinstance(tensor, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


def test_the_logits_of_all_tokens_never_exist():
    torch.manual_seed(0)
    head = nn.Linear(8, 500)
    hidden_states, labels = torch.randn(256, 8, requires_grad=True), torch.randint(500, (256,))
    largest = []
    for of in (head_loss, plain_loss):
        with Largest() as mode:
            of(hidden_states, head, labels).backward()
        largest.append(mode.elements)
    assert largest == [16 * 500, 256 * 500]


# ---------------------------------------------------------------------- Liger


def test_liger_computes_the_loss_where_it_is_asked_for(models, monkeypatch):
    """A double with the signature of Liger's class (0.8.5), whose kernel needs a GPU."""
    calls = []

    class LigerFusedLinearCrossEntropyLoss(nn.Module):
        def __init__(self, ce_weight=None, ignore_index=-100, reduction="mean"):
            super().__init__()
            assert ce_weight is None
            self.settings = {"ignore_index": ignore_index, "reduction": reduction}

        def forward(self, lin_weight, _input, target, bias=None):
            calls.append(_input.shape)
            return cross_entropy(_input @ lin_weight.T + bias, target, **self.settings)

    package = ModuleType("liger_kernel.transformers")
    package.LigerFusedLinearCrossEntropyLoss = LigerFusedLinearCrossEntropyLoss
    model = models("phi")
    inputs = double("shared_image")
    expected = loss_and_gradients(model, inputs)
    monkeypatch.setattr(model, "use_liger_kernel", True)
    monkeypatch.setattr(loss_jnana, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ImportError, match="`use_liger_kernel` is True, but liger-kernel is not installed"):
        model(**inputs[0], skip_logits=True)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(loss_jnana, "is_liger_kernel_available", lambda: True)
    assert difference(loss_and_gradients(model, skipping(inputs)), expected) < EXACT
    assert calls == [(len(inputs[0]["logit_positions"]), 64)]


def test_positions_of_a_whole_batch_are_refused_in_a_replica(models, monkeypatch):
    """torch's DataParallel cuts every tensor along its first dimension, and these vectors too."""
    model = models("phi")
    inputs = double("shared_image")[0]
    monkeypatch.setattr(model, "_is_replica", True, raising=False)
    with pytest.raises(ValueError, match="DataParallel splits the batches .*`accelerate launch`"):
        model(**inputs)


def test_small_gradients_in_float16_keep_their_digits():
    """Among 131,072 words most gradients of logits are about 8e-6, which float16 holds to one part in a hundred."""
    torch.manual_seed(0)
    head, states = torch.nn.Linear(8, 2**17), torch.randn(16, 8)
    labels = torch.randint(0, 2**17, (16,))
    found = {}
    for dtype in (torch.float32, torch.float16):
        ours = copy.deepcopy(head).to(torch.float16).to(dtype)
        inputs = states.half().to(dtype).requires_grad_()
        head_loss(inputs, ours, labels, num_items_in_batch=1).backward()
        others = torch.ones(2**17, dtype=torch.bool).index_fill(0, labels, False)  # words that are no label
        found[dtype] = ours.weight.grad[others].float()
    exact, half = found.values()
    assert (half - exact).norm() / exact.norm() < 1e-3
