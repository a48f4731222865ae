from mmemb.data.templates import render
from mmemb.types import Image, Item, Page, Text, Video, pictures


def test_instruction_comes_first_and_parts_keep_their_order() -> None:
    item = Item("Find it:", (Text("left"), Image("/a.png"), Text("right")))
    assert render(item) == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Find it:"},
                {"type": "text", "text": "left"},
                {"type": "image"},
                {"type": "text", "text": "right"},
            ],
        }
    ]


def test_a_video_has_an_image_per_frame_and_a_page_has_one_image() -> None:
    item = Item("", (Video(("/1.png", "/2.png", "/3.png")), Text("then"), Page("/p.png")))
    kinds = [entry["type"] for entry in render(item)[0]["content"]]
    assert kinds == ["image", "image", "image", "text", "image"]
    assert kinds.count("image") == len(list(pictures(item)))


def test_empty_texts_have_no_entry() -> None:
    assert render(Item("", (Text(""), Image("/a.png"))))[0]["content"] == [{"type": "image"}]
