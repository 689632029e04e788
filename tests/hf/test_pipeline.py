import numpy as np
import pytest
from PIL import Image
from tiny import make_image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from pdlm_hf import RegionCaptioner, SettingError

SETTINGS = {"max_new_tokens": 6, "max_denoising_steps": 3}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return pipeline("region-captioning", model=str(tiny_checkpoint), device="cpu")


def inputs(seed, count):
    image, masks = make_image(seed, 100, 64, count)
    return {"image": Image.fromarray(image), "regions": masks}


def expected(folder, entry):
    captions = RegionCaptioner.from_pretrained(folder).caption(entry["image"], entry["regions"], **SETTINGS)
    return [{"id": c.id, "caption": c.text, "score": c.score, "bbox": c.bbox} for c in captions]


def test_one_image(pipe, tiny_checkpoint):
    entry = inputs(1, 2)
    assert pipe(entry, **SETTINGS) == expected(tiny_checkpoint, entry)


def test_a_list_of_images(pipe, tiny_checkpoint):
    entries = [inputs(1, 2), inputs(2, 3)]
    assert pipe(entries, **SETTINGS) == [expected(tiny_checkpoint, entry) for entry in entries]


def test_regions_in_other_forms_and_a_question(pipe, tmp_path):
    image, _ = make_image(1, 100, 64, 1)
    Image.fromarray(image).save(tmp_path / "a.png")
    entry = {"image": str(tmp_path / "a.png"), "regions": [{"id": "x", "bbox": [1, 2, 30, 40]}]}
    first = pipe(entry, **SETTINGS)
    assert [(row["id"], row["bbox"]) for row in first] == [("x", [1, 2, 30, 40])]
    assert pipe(entry, question="Which colour is it?", **SETTINGS) != first


@pytest.mark.parametrize("entry", [5, {"image": np.zeros((9, 9, 3), np.uint8)}, {"regions": []}])
def test_wrong_input(pipe, entry):
    with pytest.raises(ValueError, match='region-captioning takes {"image": image, "regions"'):
        pipe(entry)


def test_unknown_setting(pipe):
    with pytest.raises(ValueError, match="Unknown generation settings"):
        pipe(inputs(1, 1), num_beams=3)


def test_stock_image_text_to_text(golden_base):
    image = Image.fromarray(make_image(2, 256, 128)[0])
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    chat = pipeline("image-text-to-text", model=str(golden_base), device="cpu")
    settings = {"max_new_tokens": 8, "max_denoising_steps": 4}
    processor = AutoProcessor.from_pretrained(golden_base)
    model = AutoModelForImageTextToText.from_pretrained(golden_base)
    batch = processor(images=image, text="What is this?")
    sequences = model.generate(**batch, **settings)
    answer = processor.post_process_answers(sequences)[0]
    assert answer

    got = chat(text=messages, return_full_text=False, generate_kwargs=settings)
    assert got[0]["generated_text"].strip() == answer
    whole = chat(text=messages, generate_kwargs=settings)[0]["generated_text"]
    assert [message["role"] for message in whole] == ["user", "assistant"]
    assert whole[-1]["content"].strip() == answer


def test_stock_pipeline_takes_max_new_tokens(golden_base):
    chat = pipeline("image-text-to-text", model=str(golden_base), device="cpu")
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    got = chat(text=messages, max_new_tokens=4, return_full_text=False)
    assert isinstance(got[0]["generated_text"], str)


def test_batches_are_refused_with_the_alternative(pipe):
    with pytest.raises(ValueError, match="caption_many"):
        list(pipe([inputs(1, 2)] * 2, batch_size=2))


def test_attributes(tiny_checkpoint):
    pipe = pipeline("region-attributes", model=str(tiny_checkpoint), device="cpu")
    entry = inputs(1, 2)
    schema = {"size": ["small", "large"], "striped": [True, False]}
    found = pipe(entry, schema=schema, jointly=True)
    captioner = RegionCaptioner.from_pretrained(tiny_checkpoint, device="cpu")
    assert found == [
        row.to_row() for row in captioner.attributes(entry["image"], entry["regions"], schema, jointly=True)
    ]
    made = pipeline("region-attributes", model=pipe.model, processor=pipe.processor, schema=schema)
    assert made(entry, jointly=True) == found  # settings of a call, for the schema of the pipeline
    assert made(entry, unknown_below=1.0)[0]["attributes"]["size"]["value"] is None
    with pytest.raises(SettingError, match="region-attributes needs a schema"):
        pipe(entry)
    with pytest.raises(SettingError, match="region-attributes takes"):
        pipe({"image": entry["image"]}, schema=schema)
    with pytest.raises(SettingError, match="the list of choices is empty"):
        pipe(entry, schema={"a": []})
