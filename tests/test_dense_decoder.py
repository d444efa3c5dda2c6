"""UNet++'s faster decoder against segmentation-models-pytorch's own: the same answer, the same gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.unetplusplus.decoder import UnetPlusPlusDecoder

from dense_decoder import doubled_convolution
from models import ModelSpec, build_model


@pytest.mark.parametrize("height, width", [(1, 1), (4, 4), (5, 3)])
def test_a_convolution_of_a_doubled_image(height, width):
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    image = torch.randn(2, 3, height, width, **draw).requires_grad_()
    kernel = torch.randn(4, 3, 3, 3, **draw).requires_grad_()
    expected = F.conv2d(F.interpolate(image, scale_factor=2.0, mode="nearest"), kernel, padding=1)
    answer = doubled_convolution(image, kernel)
    torch.testing.assert_close(answer, expected)
    weights = torch.randn(answer.shape, **draw)
    mine = torch.autograd.grad((answer * weights).sum(), (image, kernel))
    theirs = torch.autograd.grad((expected * weights).sum(), (image, kernel))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("freeze", [(), ("encoder",)])
@pytest.mark.parametrize("options", [{}, {"encoder_depth": 4, "decoder_channels": [32, 16, 8, 8]}])
def test_a_training_step_is_the_librarys(freeze, options):
    model = build_model(ModelSpec("unetpp", "smoke", freeze=freeze, options=options)).double().train()
    twin = copy.deepcopy(model)
    assert type(model.decoder) is not UnetPlusPlusDecoder
    twin.decoder.__class__ = UnetPlusPlusDecoder
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    answers = [each(images) for each in (model, twin)]
    torch.testing.assert_close(*answers)
    for answer in answers:
        answer.square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters()):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)
    for mine, theirs in zip(model.buffers(), twin.buffers()):
        torch.testing.assert_close(mine, theirs)  # batch norms have seen the same


def test_in_eval_mode_every_module_is_called():
    model = build_model(ModelSpec("unetpp", "smoke"))
    called = set()
    for name, module in model.decoder.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model.eval()(torch.rand(1, 3, 64, 64))
    assert "blocks.x_0_1.conv1.0" in called and "blocks.x_0_1" in called


def test_a_decoder_with_attention_is_left_alone():
    model = build_model(ModelSpec("unetpp", "demo", options={"decoder_attention_type": "scse"}))
    assert type(model.decoder) is UnetPlusPlusDecoder
    assert model.train()(torch.rand(2, 3, 64, 64)).shape == (2, 1, 64, 64)
