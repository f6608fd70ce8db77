"""The words for each objective in reports and model cards: its title, its reward, and the paper it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from jax_simpo.config import objective_weights
from jax_simpo.config.objectives import ObjectiveValue, described


@dataclass(frozen=True)
class ObjectiveText:
    """The words for an objective.

    Attributes:
        title: its name as its paper writes it.
        reward: the reward of a response, in words.
        citation: the paper, as BibTeX.
    """

    title: str
    reward: str
    citation: str


_MEAN = "beta times the mean log-probability of a response"
_SUM = "beta times the log-probability of a response"
_RATIO = "beta times the log-ratio of a response to the reference"


def _paper(key: str, title: str, authors: str, year: int, arxiv: str) -> str:
    return (
        f"@misc{{{key},\n  title  = {{{title}}},\n  author = {{{authors}}},\n  year   = {{{year}}},\n"
        f"  eprint = {{{arxiv}}},\n  archivePrefix = {{arXiv}}\n}}"
    )


_DPO = _paper(
    "rafailov2023dpo",
    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    "Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Ermon, Stefano and Manning, Christopher D. and "
    "Finn, Chelsea",
    2023,
    "2305.18290",
)
_APO = _paper(
    "doosterlinck2024apo",
    "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
    "D'Oosterlinck, Karel and others",
    2024,
    "2408.06266",
)
OBJECTIVE_TEXTS: dict[str, ObjectiveText] = {
    "simpo": ObjectiveText(
        "SimPO (simple preference optimization with a reference-free reward)",
        _MEAN,
        """\
@inproceedings{meng2024simpo,
  title     = {{SimPO}: Simple Preference Optimization with a Reference-Free Reward},
  author    = {Meng, Yu and Xia, Mengzhou and Chen, Danqi},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024}
}""",
    ),
    "alphapo": ObjectiveText(
        "AlphaPO",
        "beta times (1 - p^-alpha) / alpha, where p is the mean probability of a token",
        _paper(
            "gupta2025alphapo",
            "AlphaPO: Reward Shape Matters for LLM Alignment",
            "Gupta, Aman and others",
            2025,
            "2501.03884",
        ),
    ),
    "simper": ObjectiveText(
        "SimPER",
        "the inverse perplexity of a response",
        _paper(
            "xiao2025simper",
            "SimPER: A Minimalist Approach to Preference Alignment without Hyperparameters",
            "Xiao, Teng and others",
            2025,
            "2502.00883",
        ),
    ),
    "cpo": ObjectiveText(
        "CPO (contrastive preference optimization)",
        _SUM,
        _paper(
            "xu2024cpo",
            "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
            "Xu, Haoran and others",
            2024,
            "2401.08417",
        ),
    ),
    "slic": ObjectiveText(
        "SLiC-HF (sequence likelihood calibration)",
        "the log-probability of a response",
        _paper(
            "zhao2023slic",
            "SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
            "Zhao, Yao and others",
            2023,
            "2305.10425",
        ),
    ),
    "orpo": ObjectiveText(
        "ORPO (odds ratio preference optimization)",
        _MEAN,
        _paper(
            "hong2024orpo",
            "ORPO: Monolithic Preference Optimization without Reference Model",
            "Hong, Jiwoo and Lee, Noah and Thorne, James",
            2024,
            "2403.07691",
        ),
    ),
    "dpo": ObjectiveText("DPO (direct preference optimization)", _RATIO, _DPO),
    "robust": ObjectiveText(
        "robust DPO",
        _RATIO,
        _paper(
            "chowdhury2024robust",
            "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
            "Chowdhury, Sayak Ray and Kini, Anush and Natarajan, Nagarajan",
            2024,
            "2403.00409",
        ),
    ),
    "ipo": ObjectiveText(
        "IPO (identity preference optimization)",
        _RATIO,
        _paper(
            "azar2023ipo",
            "A General Theoretical Paradigm to Understand Learning from Human Preferences",
            "Azar, Mohammad Gheshlaghi and others",
            2023,
            "2310.12036",
        ),
    ),
    "sigmoid_norm": ObjectiveText(
        "length-normalised DPO",
        f"{_RATIO}, divided by its number of tokens",
        _paper(
            "lambert2024tulu3",
            "Tulu 3: Pushing Frontiers in Open Language Model Post-Training",
            "Lambert, Nathan and others",
            2024,
            "2411.15124",
        ),
    ),
    "dpop": ObjectiveText(
        "DPO-Positive",
        _RATIO,
        _paper(
            "pal2024smaug",
            "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive",
            "Pal, Arka and others",
            2024,
            "2402.13228",
        ),
    ),
    "exo_pair": ObjectiveText(
        "EXO (efficient exact optimization)",
        _RATIO,
        _paper(
            "ji2024exo",
            "Towards Efficient Exact Optimization of Language Model Alignment",
            "Ji, Haozhe and others",
            2024,
            "2402.00856",
        ),
    ),
    "apo_zero": ObjectiveText("APO-zero (anchored preference optimization)", _RATIO, _APO),
    "apo_down": ObjectiveText("APO-down (anchored preference optimization)", _RATIO, _APO),
    "nca_pair": ObjectiveText(
        "NCA (noise contrastive alignment)",
        _RATIO,
        _paper(
            "chen2024nca",
            "Noise Contrastive Alignment of Language Models with Explicit Rewards",
            "Chen, Huayu and others",
            2024,
            "2402.05369",
        ),
    ),
    "bco_pair": ObjectiveText(
        "BCO (binary classifier optimization)",
        _RATIO,
        _paper(
            "jung2024bco",
            "Binary Classifier Optimization for Large Language Model Alignment",
            "Jung, Seungjae and others",
            2024,
            "2404.04656",
        ),
    ),
    "sppo_hard": ObjectiveText(
        "SPPO (self-play preference optimization)",
        _RATIO,
        _paper(
            "wu2024sppo",
            "Self-Play Preference Optimization for Language Model Alignment",
            "Wu, Yue and others",
            2024,
            "2405.00675",
        ),
    ),
}


def texts_of(objective: ObjectiveValue) -> list[ObjectiveText]:
    """Returns the words for the objectives of a config, in their order."""
    names = objective_weights(objective)
    if not names or not names.keys() <= OBJECTIVE_TEXTS.keys():  # one's own, perhaps as a config file describes it
        return [ObjectiveText(f"the objective `{described(objective)}`", "what that objective defines", "")]
    return [OBJECTIVE_TEXTS[name] for name in names]
