"""KD on texts that a masked language model makes of the training texts, as TinyBERT's are (Jiao et al. 2020,
arXiv:1909.10351; recipes.glue.augment).

½ T² KL(p_T ‖ q_S) over all texts + ½ CE over those with a label (recipes.methods.hinton), in as many steps as without
the further texts. Any other method takes them too: `--method pkd:augment=8`.
"""

from transformers import PreTrainedModel

from recipes.glue.augment import augmented
from recipes.glue.method import Count, Method, Natural, Positive, PositiveShare, Share
from recipes.glue.run import Run
from recipes.methods.hinton import distil


def augmented_kd(
    run: Run,
    *,
    times: Count = 8,
    generator: str = "",
    pretraining: Natural = 100,
    probability: PositiveShare = 0.4,
    candidates: Count = 15,
    temperature: Positive = 2.0,
    alpha: Share = 0.5,
) -> PreTrainedModel:
    more = augmented(run, times, generator, probability=probability, candidates=candidates, pretraining=pretraining)
    return distil(more, temperature=temperature, alpha=alpha)


METHODS = {
    "augmented_kd": Method(
        augmented_kd,
        "TinyBERT's augmentation + KD",
        "arXiv:1909.10351",
        published="GLUE dev, average of 8 tasks, DistilRoBERTa from RoBERTa-large: 81.12 (KD 80.77; in "
        "arXiv:2105.05912)",
    )
}
