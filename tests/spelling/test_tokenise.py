"""Words of natural spelling -> WikiText's form: every rule, typography, scripts, special words."""

from __future__ import annotations

import pytest

from mlm.spelling import WordFeed
from mlm.spelling.tokenise import plain_typography, tokenise


def forms_of(text: str, form: str = "plain") -> str:
    """All of the model's words of a text, `¶` for a line end."""
    feed = WordFeed(form)
    words = feed.read(text) + feed.finish()
    return " ".join("¶" if word.line_end else " ".join(word.forms) for word in words)


@pytest.mark.parametrize(
    ("natural", "tokenised"),
    [
        ("Hello, world!", "Hello , world !"),
        ('He said: "Go on; why not?"', 'He said : " Go on ; why not ? "'),
        ("(see below) [2] {x}", "( see below ) [ 2 ] { x }"),
        ("a well-known 18-year-old", "a well @-@ known 18 @-@ year @-@ old"),
        ("18- to 24-hour days, -5 and pre-", "18- to 24 @-@ hour days , -5 and pre-"),
        ("1,000,000 or 3.5, 1.5.", "1 @,@ 000 @,@ 000 or 3 @.@ 5 , 1 @.@ 5 ."),
        (".38 in 5,a and a,5", ".38 in 5 , a and a , 5"),
        ("$4.50, £3, 5% at 17:10", "$ 4 @.@ 50 , £ 3 , 5 % at 17 : 10"),
        ("John's dogs' and I'm; didn't", "John 's dogs ' and I 'm ; didn 't"),
        ("O'Neil's 90's '90s", "O 'Neil 's 90 's ' 90s"),
        ("rock 'n' roll", "rock ' n ' roll"),
        ("wait... what...?", "wait ... what ... ?"),
        ("km/h A&B 86°F #1 @me", "km / h A & B 86 ° F # 1 @ me"),
        ("1914–18 — yes—no", "1914 – 18 — yes — no"),
        ("yes--no and a---b ------", "yes — no and a — b ------"),
        ("a.b.com/x_y 1½ x²", "a.b.com / x _ y 1 ½ x ²"),
        ("<unk> <eos> @-@ @,@", "< unk > < eos > @ - @ @ , @"),
    ],
)
def test_signs(natural: str, tokenised: str) -> None:
    assert forms_of(natural) == tokenised


@pytest.mark.parametrize(
    ("natural", "tokenised"),
    [
        ("The end. Then more.", "The end . Then more ."),
        ("Mr. Hill met Dr. Ray in St. Ives.", "Mr. Hill met Dr. Ray in St. Ives ."),
        ("J. R. Hill of the U.S. won at 5 p.m. Then", "J. R. Hill of the U.S. won at 5 p.m. Then"),
        ("World War I.", "World War I."),
        ("e.g., (i.e.) a Ph.D.", "e.g. , ( i.e. ) a Ph.D."),
        ("No. 5 is left. He said no. Then No.", "No. 5 is left . He said no . Then No ."),
        ("figs etc. are sold. Figs etc. Then", "figs etc. are sold . Figs etc . Then"),
        ("i left. then i slept.", "i left . then i slept ."),
        ("etc.\nand", "etc . ¶ and"),
        ("see example.com. Then 3.5km. Then", "see example.com . Then 3 @.@ 5km . Then"),
        ("non-U.S. firms, Smith-Jones. A", "non @-@ U.S. firms , Smith @-@ Jones . A"),
        ("А. С. Пушкин умер. Потом", "А. С. Пушкин умер . Потом"),
    ],
)
def test_periods(natural: str, tokenised: str) -> None:
    assert forms_of(natural) == tokenised


@pytest.mark.parametrize(
    ("typeset", "plain"),
    [
        ("“It’s”", '"It\'s"'),
        ("‘so’", "'so'"),
        ("wait…", "wait..."),
        ("well\u2011known", "well-known"),
        ("soft\u00adhyphen", "softhyphen"),
        ("cafe\u0301", "café"),
        ("don´t", "don't"),
        ("a--b", "a—b"),
        ("−5 5′ 1–2".replace(" ", ""), "−55′1–2"),
    ],
)
def test_typography_is_read_as_its_plain_form(typeset: str, plain: str) -> None:
    assert plain_typography(typeset) == plain
    assert tokenise(typeset) == tokenise(plain)
    assert tokenise(typeset).size == len(plain.encode())


def test_spaces_that_do_not_break_are_spaces() -> None:
    assert forms_of("10\u00a0km\u202f, 5\u2009m") == "10 km , 5 m"


def test_invisible_characters_alone_are_a_word() -> None:
    assert tokenise("\u200b").forms == ("\u200b",)
    assert tokenise("\u00ad\u2060").forms


@pytest.mark.parametrize(
    "cluster",
    [
        "👩‍👩‍👧‍👦",  # joined by zero-width joiners
        "👍🏽",  # a tone of skin
        "❤️",  # a variation selector
        "🇫🇷",  # two halves of a flag
        "🏴󠁧󠁢󠁳󠁣󠁴󠁿",  # tags
    ],
)
def test_an_emoji_is_one_word(cluster: str) -> None:
    assert tokenise(cluster + "!").forms == (cluster, "!")
    assert tokenise("so" + cluster + "then").forms == ("so", cluster, "then")
    assert tokenise(cluster + "🎉").forms == (cluster, "🎉")


@pytest.mark.parametrize(
    ("natural", "tokenised"),
    [
        ("القط نائم، أليس كذلك؟", "القط نائم ، أليس كذلك ؟"),  # Arabic
        ("החתול ישן, נכון?", "החתול ישן , נכון ?"),  # Hebrew
        ("बिल्ली सो रही है।", "बिल्ली सो रही है ।"),  # Hindi
        ("แมวกำลังนอนหลับ", "แมวกำลังนอนหลับ"),  # Thai
        ("猫在睡觉，对吗？", "猫在睡觉 ， 对吗 ？"),  # Chinese
        ("猫は寝ています。", "猫は寝ています 。"),  # Japanese
        ("고양이가 자고 있어요.", "고양이가 자고 있어요 ."),  # Korean
        ("Кот спит, правда?", "Кот спит , правда ?"),  # Russian
        ("Η γάτα κοιμάται.", "Η γάτα κοιμάται ."),  # Greek
        ("კატას სძინავს.", "კატას სძინავს ."),  # Georgian
        ("Կատուն քնած է։", "Կատուն քնած է ։"),  # Armenian
        ("বিড়ালটি ঘুমাচ্ছে।", "বিড়ালটি ঘুমাচ্ছে ।"),  # Bengali
        ("பூனை தூங்குகிறது.", "பூனை தூங்குகிறது ."),  # Tamil
        ("ድመቷ ተኝታለች።", "ድመቷ ተኝታለች ።"),  # Amharic
        ("گربه می‌خوابد.", "گربه می‌خوابد ."),  # Persian, with a zero-width non-joiner
        ("Kedi uyuyor, değil mi?", "Kedi uyuyor , değil mi ?"),  # Turkish
        ("Con mèo đang ngủ.", "Con mèo đang ngủ ."),  # Vietnamese
        ("Die Katze schläft, oder?", "Die Katze schläft , oder ?"),  # German
        ("L'été, le chat dort.", "L 'été , le chat dort ."),  # French
        ("¿Duerme el gato?", "¿ Duerme el gato ?"),  # Spanish
        ("Kočka spí, že?", "Kočka spí , že ?"),  # Czech
        ("ꀊꂿ 𐎠𐎡 ꯍꯧ", "ꀊꂿ 𐎠𐎡 ꯍꯧ"),  # Yi, Old Persian, Meitei
    ],
)
def test_scripts(natural: str, tokenised: str) -> None:
    import unicodedata

    assert forms_of(natural) == unicodedata.normalize("NFC", tokenised)


def test_control_characters_are_kept() -> None:
    assert tokenise("a\x00b").forms == ("a", "\x00", "b")


def test_lone_surrogates_do_no_harm() -> None:
    assert tokenise("a\ud800").forms == ("a", "\ufffd")
