"""Prose out of pages and files: paragraphs stay, what frames them goes, and long texts are cut between paragraphs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.sources.prose import PARAGRAPH, cut, prose_of, text_of_page, tidy

SENTENCE = "The quick brown fox jumps over the lazy dog, again and again."

PAGE = f"""<!DOCTYPE html>
<html><head><title>Left out</title><style>p {{ color: red }}</style><script>if (a < b) {{ "</p>" }}</script></head>
<body class="page"><div class="navheader"><div>Prev</div> <a href="x">Next</a></div>
<nav><ul><li>Home<li>Contents</ul></nav>
<h1>A  heading<a class="headerlink" href="#a">\u00b6</a></h1>
<p>{SENTENCE} <b>Bold</b>&nbsp;and <i>slanted</i> &amp; caf&eacute;
over two lines.<br>A new line.
<p>An open paragraph<table><tr><td>one</td><td>two</td></tr></table>
<pre>int main(void) {{ return 0; }}</pre>
<ul><li>first</li><li>second <span class="sidebar">not <span>this</span></span>item</li></ul>
<div role="navigation">Up</div><img src="a.png"><hr/><script src="a.js"/></script>tail &#x41;
</body></html>"""


def test_a_page_gives_its_paragraphs():
    assert text_of_page(PAGE).split(PARAGRAPH) == [
        "A heading",
        f"{SENTENCE} Bold and slanted & caf\u00e9 over two lines.\nA new line.",
        "An open paragraph",
        "one",
        "two",
        "first",
        "second item",
        "tail A",
    ]


def test_pages_that_are_none_are_read_as_far_as_they_go():
    assert text_of_page("") == text_of_page("<nav>never ended <p>text") == text_of_page("<pre>listing") == ""
    assert text_of_page("<head><title>no end<body>text") == "text"
    assert text_of_page("</div></nav></p>text <unknown>more</unknown>") == "text more"
    assert text_of_page("a < b & c &nosuch; <p/>d") == "a < b & c &nosuch;\n\nd"
    assert text_of_page("<div class>x</div><div class='NAV other'>y</div>z") == "x\n\nz"


def test_text_files_lose_what_only_printers_need():
    raw = "N\u0008N_\u0008ame  \r\nb\rc\u00a0d\t\f\n\n\n \ne\x1b\x00\u00ad\n%\nf\n\n"
    assert tidy(raw) == "Name\nb\nc d\n\ne\n\nf"
    assert tidy("  indented\n  verse") == "  indented\n  verse"


def test_prose_stays_with_its_headings():
    listing = 'int main(void) {\n    return printf("%d\\n", 1 + 2) != 0 && errno; }'
    paragraphs = ["Next: a, Up: b", "1.2 A heading", SENTENCE, listing, "see also", "foo", SENTENCE, "end", "more"]
    text, share = prose_of(PARAGRAPH.join(paragraphs))
    assert text.split(PARAGRAPH) == ["1.2 A heading", SENTENCE, "foo", SENTENCE]
    assert share == pytest.approx(len("".join(text.split(PARAGRAPH))) / len("".join(paragraphs)))
    assert prose_of("") == prose_of("\n\n \n\n" + listing)[:1] + (0.0,) == ("", 0.0)
    assert prose_of("seven words are too few for it")[0] == ""
    assert prose_of("eight words are enough for it: \u201cd\u00e9j\u00e0 vu\u201d, it's well-known")[1] == 1
    assert prose_of("x = 1, y = 2 and z = 3 are no words")[0] == ""


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 200))
def test_a_text_is_cut_between_paragraphs_alone(lengths, most):
    paragraphs = [chr(97 + number % 26) * length for number, length in enumerate(lengths)]
    parts = cut(PARAGRAPH.join(paragraphs), most)
    assert PARAGRAPH.join(parts) == PARAGRAPH.join(paragraphs)
    assert all(len(part) <= most or PARAGRAPH not in part for part in parts)


def test_parts_are_about_equal():
    parts = cut(PARAGRAPH.join(["x" * 98] * 25), 1000)
    assert [len(part) for part in parts] == [598, 598, 698, 598]
    assert cut("short", 5) == ["short"] and cut("short", 4) == ["short"]
