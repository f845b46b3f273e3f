"""The loss of a student: its range, its gradient, its precision (section 4.2)."""

import pytest
import torch
import torch.nn.functional as F

from switchworks.distil.loss import distillation_loss
from switchworks.model.losses import cross_entropy


def test_the_distillation_loss_of_the_teacher_itself_is_its_entropy():
    """The lower end of its range, at each temperature: T^2 H(softmax(logits / T))."""
    logits, targets = torch.randn(2, 3, 7), torch.ones(2, 3, dtype=torch.long)
    for temperature in (0.5, 1.0, 4.0):
        entropy = torch.distributions.Categorical(logits=logits / temperature).entropy().mean()
        ours = distillation_loss(logits + 3.0, logits, targets, temperature)
        torch.testing.assert_close(ours, temperature**2 * entropy)


def test_a_teacher_that_is_certain_of_the_text_is_the_text():
    logits, targets = torch.randn(2, 5, 9), torch.randint(0, 9, (2, 5))
    certain = 1e4 * F.one_hot(targets, 9).float()
    ours = distillation_loss(logits, certain, targets)
    torch.testing.assert_close(ours, cross_entropy(logits, targets)[0])


@pytest.mark.parametrize("block", [1, 40, 2**18])
def test_the_gradient_of_the_distillation_loss_is_t_times_the_difference_of_probabilities(
    block, monkeypatch
):
    """Hinton et al. 2015, equation 2, times T^2: T (softmax(s/T) - softmax(t/T)) / N where a
    target is real; values from torch's cross-entropy with probabilities. In float64."""
    monkeypatch.setattr("switchworks.model.losses.BLOCK", block)
    student = torch.randn(5, 14, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 14, 11, dtype=torch.float64, requires_grad=True)
    targets, heat = torch.randint(0, 11, (5, 14)), 2.5
    loss = distillation_loss(student, teacher, targets, heat)
    real = targets != 0
    soft = (teacher / heat).softmax(-1)
    plain = heat**2 * F.cross_entropy((student / heat)[real], soft[real])
    torch.testing.assert_close(loss, plain)
    loss.backward()
    expected = heat * ((student / heat).softmax(-1) - soft) * real[..., None] / real.sum()
    torch.testing.assert_close(student.grad, expected)
    assert teacher.grad is None


def test_the_distillation_loss_of_bfloat16_logits_is_taken_in_float32():
    student, teacher = torch.randn(1, 4, 9).bfloat16(), torch.randn(1, 4, 9).bfloat16()
    targets = torch.tensor([[1, 2, 3, 4]])
    ours = distillation_loss(student, teacher, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, distillation_loss(student.float(), teacher.float(), targets))


def test_padding_alone_teaches_nothing():
    nothing = torch.zeros(2, 3, dtype=torch.long)
    assert distillation_loss(torch.randn(2, 3, 5), torch.randn(2, 3, 5), nothing) == 0
