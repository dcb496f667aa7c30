"""Print the counts of the demo data set and what a bag of words can read in it.

`python scripts/demo_data/measure.py` needs scikit-learn; the generator itself does not.
"""

import argparse
from collections import Counter

from generate import SPLITS, Row, build
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline


def bag_of_words_auroc(train: list[Row], other: list[Row]) -> float:
    """AUROC on `other` of TF-IDF over one and two words with a logistic regression, fitted on `train`."""
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    model.fit([row["prompt"] for row in train], [row["label"] for row in train])
    scores = model.predict_proba([row["prompt"] for row in other])[:, 1]
    return float(roc_auc_score([row["label"] for row in other], scores))


def main() -> None:
    """Print a line per split, the rows per category, and the AUROC of the bag of words."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    files = build()
    for split in SPLITS:
        rows = files[f"{split}.jsonl.gz"]
        topics, templates = ({row[key] for row in rows} for key in ("topic", "template"))
        share = sum(int(row["label"]) for row in rows) / len(rows)
        sizes = f"{len(rows)} rows, {len(topics)} topics, {len(templates)} templates"
        print(f"{split}: {sizes}, {share:.1%} flagged")
        print("  " + str(sorted(Counter(f"{row['category']}/{row['label']}" for row in rows).items())))
    train = files["train.jsonl.gz"]
    for split in SPLITS[1:]:
        rows = files[f"{split}.jsonl.gz"]
        alike = [row for row in rows if row["category"] != "benign"]
        print(f"TF-IDF AUROC on {split}: {bag_of_words_auroc(train, rows):.3f}", end=", ")
        print(f"without the plain rows: {bag_of_words_auroc(train, alike):.3f}")


if __name__ == "__main__":
    main()
