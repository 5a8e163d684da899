"""A student alone, on labels and on embeddings shifted against it (Miyato et al. 2017, arXiv:1605.07725, §3).

CE(q(x), y) + CE(q(x + r), y), r = ε g/‖g‖, g = ∂CE(q(x), y)/∂(the embeddings of x), with one norm for all tokens of an
example and r without a gradient. Of scores CE is the squared difference. (Miyato et al. first normalise the embeddings,
whose scale would otherwise grow against ε; those of a pretrained model stay as they are here.)
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recipes.glue.method import Method, Weight
from recipes.glue.run import Run
from recipes.glue.step import Step


def adversarial(run: Run, *, epsilon: Weight = 1.0) -> PreTrainedModel:
    student = run.student()
    table = student.get_input_embeddings()

    def loss(step: Step) -> Tensor:
        embeddings = table(step.batch["input_ids"])
        own = embeddings.detach().requires_grad_()
        hard = step.hard(step.run(student, input_ids=None, inputs_embeds=own).logits)
        (g,) = torch.autograd.grad(hard, own)
        norm = g.norm(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
        shifted = step.run(step.model, input_ids=None, inputs_embeds=embeddings + epsilon * g / norm)
        return step.hard() + step.hard(shifted.logits)

    return run.fit(student, loss, run.labelled)


METHODS = {"adversarial": Method(adversarial, "student + adversarial", "arXiv:1605.07725", needs=("both_directions",))}
