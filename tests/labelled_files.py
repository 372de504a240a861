"""Small labelled sets in files, for tests; a label may be -1 or None."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter
from imagenet_sets import pictures
from pictures import encoded
from tensorflow_datasets.proto import tf_example_pb2

NAMES = ("ant", "bee", "cow")
IMAGES = [encoded(picture, "PNG") for picture in pictures(0, 12, (8, 8))]


def write_parquet(root, split, labels, names=NAMES, images=IMAGES):
    root.mkdir(parents=True, exist_ok=True)
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    table = pa.table({"image": images[: len(labels)], "label": pa.array(labels, pa.int64())})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, root / f"{split}.parquet", row_group_size=5)


def write_array_records(root, split, labels, names=NAMES, images=IMAGES):
    root.mkdir(parents=True, exist_ok=True)
    if names:
        (root / "classes.txt").write_text("\n".join(names))
    writer = ArrayRecordWriter(str(root / f"{split}.array_record"), "group_size:1")
    for data, label in zip(images, labels):
        made = tf_example_pb2.Example()
        made.features.feature["image"].bytes_list.value.append(data)
        if label is not None:
            made.features.feature["label"].int64_list.value.append(label)
        writer.write(made.SerializeToString())
    writer.close()
