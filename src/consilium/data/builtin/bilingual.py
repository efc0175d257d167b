"""The bilingual domain: numbers, dates, sums and simple sentences, in Chinese and in English side by side."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from consilium.data.builtin.numerals import chinese, chinese_count, chinese_digits, english
from consilium.data.documents import Text

SHARDS = 200
SHARD_BYTES = 2000
YEAR = "January February March April May June July August September October November December"
MONTHS = YEAR.split()
WEEKDAYS = (("Monday", "星期一"), ("Tuesday", "星期二"), ("Wednesday", "星期三"), ("Thursday", "星期四"))
PEOPLE = (("My sister", "我姐姐"), ("My brother", "我哥哥"), ("The teacher", "老师"), ("The doctor", "医生"))
PEOPLE += (("My friend", "我的朋友"), ("The student", "那个学生"), ("Our neighbour", "我们的邻居"))
THINGS = (("book", "本书"), ("cup", "个杯子"), ("chair", "把椅子"), ("ticket", "张票"), ("apple", "个苹果"))
THINGS += (("car", "辆车"), ("pen", "支笔"), ("cat", "只猫"), ("letter", "封信"), ("shirt", "件衬衫"))
DOINGS = (
    ("reads a book", "看书"),
    ("drinks tea", "喝茶"),
    ("goes to school", "去学校"),
    ("cooks dinner", "做晚饭"),
)
DOINGS += (("writes a letter", "写信"), ("listens to music", "听音乐"), ("learns Chinese", "学中文"))
TIMES = (
    ("every morning", "每天早上"),
    ("every evening", "每天晚上"),
    ("on Sundays", "星期天"),
    ("at noon", "中午"),
)
PLACES = (("the park", "公园"), ("the library", "图书馆"), ("the station", "车站"), ("the hospital", "医院"))
PLACES += (("the market", "市场"), ("the school", "学校"), ("the bank", "银行"))
QUALITIES = (("very big", "很大"), ("very small", "很小"), ("new", "是新的"), ("very beautiful", "很漂亮"))
QUALITIES += (("far from here", "离这里很远"), ("near here", "离这里很近"))


def bilingual_texts(shards: int = SHARDS) -> list[Text]:
    """Return texts of about 2 kB. A shard is a unit of the split and depends on its number alone."""
    return [_shard(number) for number in range(shards)]


def _shard(number: int) -> Text:
    random = Random(f"bilingual {number}")
    lines: list[str] = []
    while sum(len(line.encode()) for line in lines) < SHARD_BYTES:
        lines.append(_pair(random))
    name = f"shard {number}"
    return Text("".join(lines), "bilingual", name, f"bilingual {name}")


def _pair(random: Random) -> str:
    there, here = random.choice(FORMS)(random)
    pair = (there, here) if random.random() < 0.5 else (here, there)
    return " | ".join(pair) + "\n"


def _number(random: Random) -> tuple[str, str]:
    number = random.randrange(10 ** random.randint(1, 6))
    return f"{number}: {english(number)}", f"{number}：{chinese(number)}"


def _date(random: Random) -> tuple[str, str]:
    year, month, day = random.randint(1900, 2050), random.randint(1, 12), random.randint(1, 28)
    here = f"{chinese_digits(year)}年{chinese(month)}月{chinese(day)}日"
    return f"{day} {MONTHS[month - 1]} {year}", here


def _clock(random: Random) -> tuple[str, str]:
    (english_day, chinese_day), hour = random.choice(WEEKDAYS), random.randint(1, 11)
    return f"{english_day}, {english(hour)} o'clock", f"{chinese_day}{chinese_count(hour)}点"


def _sum(random: Random) -> tuple[str, str]:
    a, b = random.randrange(100), random.randrange(100)
    there = f"{english(a).capitalize()} plus {english(b)} equals {english(a + b)}."
    return there, f"{chinese(a)}加{chinese(b)}等于{chinese(a + b)}。"


def _product(random: Random) -> tuple[str, str]:
    a, b = random.randint(2, 12), random.randint(2, 12)
    there = f"{english(a).capitalize()} times {english(b)} is {english(a * b)}."
    return there, f"{chinese(a)}乘以{chinese(b)}等于{chinese(a * b)}。"


def _has(random: Random) -> tuple[str, str]:
    (who, here_who), (what, here_what) = random.choice(PEOPLE), random.choice(THINGS)
    count = random.randint(1, 30)
    noun = what if count == 1 else f"{what}s"
    return f"{who} has {english(count)} {noun}.", f"{here_who}有{chinese_count(count)}{here_what}。"


def _does(random: Random) -> tuple[str, str]:
    (who, here_who), (when, here_when) = random.choice(PEOPLE), random.choice(TIMES)
    what, here_what = random.choice(DOINGS)
    return f"{who} {what} {when}.", f"{here_who}{here_when}{here_what}。"


def _is(random: Random) -> tuple[str, str]:
    (where, here_where), (how, here_how) = random.choice(PLACES), random.choice(QUALITIES)
    return f"{where.capitalize()} is {how}.", f"{here_where}{here_how}。"


def _where(random: Random) -> tuple[str, str]:
    where, here_where = random.choice(PLACES)
    return f"Excuse me, where is {where}?", f"请问，{here_where}在哪里？"


FORMS: tuple[Callable[[Random], tuple[str, str]], ...] = (
    _number,
    _date,
    _clock,
    _sum,
    _product,
    _has,
    _does,
    _is,
    _where,
)
