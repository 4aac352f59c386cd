"""Where the facts of the library were read: publications, and the files of public repositories at a commit."""

from __future__ import annotations

from mechinterp.circuit_file.schema import Citation, Origin

ACDC_REPOSITORY = "https://github.com/ArthurConmy/Automatic-Circuit-Discovery"
AUTO_CIRCUIT_REPOSITORY = "https://github.com/UFO-101/auto-circuit"
AUTO_CIRCUIT_COMMIT = "57c245d5afa732669e55bccdd48cc9443a6eb505"
AUTO_CIRCUIT_FOLDER = "auto_circuit/metrics/official_circuits/circuits"


def acdc(path: str, commit: str, note: str) -> Origin:
    """A file of the repository of ACDC (MIT licence)."""
    return Origin(source=ACDC_REPOSITORY, path=path, commit=commit, note=note)


def auto_circuit(name: str, note: str) -> Origin:
    """A file of auto-circuit's folder of official circuits (no licence file: facts only)."""
    return Origin(
        source=AUTO_CIRCUIT_REPOSITORY, path=f"{AUTO_CIRCUIT_FOLDER}/{name}", commit=AUTO_CIRCUIT_COMMIT, note=note
    )


ACDC_IOI = acdc(
    "acdc/ioi/utils.py",
    "b13ccff5262951aacc462a1edb548eadb85be1b0",
    "IOI_CIRCUIT: 26 heads in 7 groups. get_ioi_true_edges: the 15 connections between groups, and what is kept.",
)
ACDC_GREATER_THAN = acdc(
    "acdc/greaterthan/utils.py",
    "d76c07f2e0f84f957cbbd51a3a0abdaff33bda0c",
    "CIRCUIT and get_greaterthan_true_edges: the groups, the connections between them, the extension for queries.",
)
ACDC_DOCSTRING = acdc(
    "acdc/docstring/utils.py",
    "8ef83a5b692014ecad973507d8f1db036651cc25",
    "get_docstring_subgraph_true_edges: 37 entries, 24 of them between nodes, 13 inside heads.",
)
ACDC_TRACR = acdc(
    "acdc/tracr_task/utils.py",
    "e160e3775c6a126c180fe3128c7dd3d4218df71d",
    "get_tracr_reverse_edges (24 entries, 11 of them between nodes) and get_tracr_proportion_edges (14, 7 between "
    "nodes): 'generated from ACDC run with threshold epsilon, metric l2 and zero ablation'.",
)
EASY_TRANSFORMER_IOI = Origin(
    source="https://github.com/TransformerLensOrg/TransformerLens",
    path="easy_transformer/ioi_circuit_extraction.py",
    commit="6395a5fb81520971a71f42e438124f2d9aa4e649",
    note="The authors' own code. CIRCUIT (name movers with their backups in one class), RELEVANT_TOKENS: the position "
    "at which each class is kept (its 'S+1' is called S1+1 here); NAIVE.",
)

WANG = Citation(
    title="Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
    authors=("Kevin Wang", "Alexandre Variengien", "Arthur Conmy", "Buck Shlegeris", "Jacob Steinhardt"),
    arxiv="2211.00593",
    bibtex="""@inproceedings{wang2023interpretability,
  title = {Interpretability in the Wild: a Circuit for Indirect Object Identification in {GPT-2} small},
  author = {Wang, Kevin and Variengien, Alexandre and Conmy, Arthur and Shlegeris, Buck and Steinhardt, Jacob},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
  note = {arXiv:2211.00593}
}""",
)
HANNA = Citation(
    title="How does GPT-2 compute greater-than?: Interpreting mathematical abilities in a pre-trained language model",
    authors=("Michael Hanna", "Ollie Liu", "Alexandre Variengien"),
    arxiv="2305.00586",
    bibtex="""@inproceedings{hanna2023greaterthan,
  title = {How does {GPT-2} compute greater-than?: Interpreting mathematical abilities in a pre-trained language model},
  author = {Hanna, Michael and Liu, Ollie and Variengien, Alexandre},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  note = {arXiv:2305.00586}
}""",
)
HEIMERSHEIM = Citation(
    title="A circuit for Python docstrings in a 4-layer attention-only transformer",
    authors=("Stefan Heimersheim", "Jett Janiak"),
    url="https://www.alignmentforum.org/posts/u6KXXmKFbXfWzoAXn",
    bibtex="""@misc{heimersheim2023docstrings,
  title = {A circuit for {Python} docstrings in a 4-layer attention-only transformer},
  author = {Heimersheim, Stefan and Janiak, Jett},
  howpublished = {Alignment Forum},
  year = {2023},
  url = {https://www.alignmentforum.org/posts/u6KXXmKFbXfWzoAXn}
}""",
)
CONMY = Citation(
    title="Towards Automated Circuit Discovery for Mechanistic Interpretability",
    authors=(
        *("Arthur Conmy", "Augustine N. Mavor-Parker", "Aengus Lynch", "Stefan Heimersheim"),
        "Adrià Garriga-Alonso",
    ),
    arxiv="2304.14997",
    bibtex="""@inproceedings{conmy2023acdc,
  title = {Towards Automated Circuit Discovery for Mechanistic Interpretability},
  author = {Conmy, Arthur and Mavor-Parker, Augustine N. and Lynch, Aengus and Heimersheim, Stefan and
    Garriga-Alonso, Adri{\\`a}},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  note = {arXiv:2304.14997}
}""",
)
MILLER = Citation(
    title="Transformer Circuit Faithfulness Metrics are not Robust",
    authors=("Joseph Miller", "Bilal Chughtai", "William Saunders"),
    arxiv="2407.08734",
    bibtex="""@misc{miller2024faithfulness,
  title = {Transformer Circuit Faithfulness Metrics are not Robust},
  author = {Miller, Joseph and Chughtai, Bilal and Saunders, William},
  year = {2024},
  eprint = {2407.08734},
  archivePrefix = {arXiv}
}""",
)
