"""Word tables from which the question templates are filled, and what joins words."""

Pair = tuple[str, str]


def phrases(text: str, separator: str = ",") -> list[str]:
    """The parts of ``text``; line breaks count as spaces."""
    return [part.strip() for part in " ".join(text.split()).split(separator)]


def words(text: str) -> list[str]:
    """The words of ``text``."""
    return text.split()


def pairs(text: str) -> list[Pair]:
    """Pairs from ``"hot/cold big/small"``."""
    return [(left, right) for left, _, right in (pair.partition("/") for pair in text.split())]


def capitalised(text: str) -> str:
    """The text with its first letter, and only that, in upper case."""
    return text[:1].upper() + text[1:]


def article(word: str) -> str:
    """The article that goes before ``word``."""
    return "an" if word[0] in "aeiou" else "a"


def numbered(lines: list[str]) -> str:
    """One line each, with its number in front."""
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))


# Country: capital.
CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Switzerland": "Bern",
    "Belgium": "Brussels",
    "the Netherlands": "Amsterdam",
    "Denmark": "Copenhagen",
    "Sweden": "Stockholm",
    "Norway": "Oslo",
    "Finland": "Helsinki",
    "Iceland": "Reykjavik",
    "Ireland": "Dublin",
    "the United Kingdom": "London",
    "England": "London",
    "Scotland": "Edinburgh",
    "Wales": "Cardiff",
    "Poland": "Warsaw",
    "the Czech Republic": "Prague",
    "Slovakia": "Bratislava",
    "Hungary": "Budapest",
    "Romania": "Bucharest",
    "Bulgaria": "Sofia",
    "Serbia": "Belgrade",
    "Croatia": "Zagreb",
    "Slovenia": "Ljubljana",
    "Albania": "Tirana",
    "Ukraine": "Kyiv",
    "Russia": "Moscow",
    "Estonia": "Tallinn",
    "Latvia": "Riga",
    "Lithuania": "Vilnius",
    "Turkey": "Ankara",
    "Egypt": "Cairo",
    "Morocco": "Rabat",
    "Tunisia": "Tunis",
    "Algeria": "Algiers",
    "Kenya": "Nairobi",
    "Ethiopia": "Addis Ababa",
    "Ghana": "Accra",
    "Nigeria": "Abuja",
    "Senegal": "Dakar",
    "Uganda": "Kampala",
    "Rwanda": "Kigali",
    "Zambia": "Lusaka",
    "Zimbabwe": "Harare",
    "Namibia": "Windhoek",
    "Cuba": "Havana",
    "Jamaica": "Kingston",
    "Mexico": "Mexico City",
    "Canada": "Ottawa",
    "the United States": "Washington, D.C.",
    "Brazil": "Brasilia",
    "Argentina": "Buenos Aires",
    "Chile": "Santiago",
    "Peru": "Lima",
    "Colombia": "Bogota",
    "Ecuador": "Quito",
    "Venezuela": "Caracas",
    "Uruguay": "Montevideo",
    "Paraguay": "Asuncion",
    "Japan": "Tokyo",
    "China": "Beijing",
    "South Korea": "Seoul",
    "India": "New Delhi",
    "Pakistan": "Islamabad",
    "Nepal": "Kathmandu",
    "Bangladesh": "Dhaka",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Indonesia": "Jakarta",
    "Malaysia": "Kuala Lumpur",
    "the Philippines": "Manila",
    "Australia": "Canberra",
    "New Zealand": "Wellington",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Saudi Arabia": "Riyadh",
    "Jordan": "Amman",
    "Lebanon": "Beirut",
    "Syria": "Damascus",
    "Qatar": "Doha",
    "Afghanistan": "Kabul",
    "Mongolia": "Ulaanbaatar",
}

# Kind of thing: some of its kind.
EXAMPLES = {
    kind: phrases(names)
    for kind, names in {
        "fruits": "apples, bananas, oranges, grapes, pears, cherries, mangoes, peaches, plums, strawberries",
        "vegetables": "carrots, potatoes, onions, tomatoes, peas, beans, spinach, cabbage, peppers, corn",
        "colors": "red, blue, green, yellow, orange, purple, pink, brown, black, white",
        "animals": "dogs, cats, horses, cows, lions, tigers, elephants, bears, rabbits, foxes",
        "farm animals": "cows, pigs, sheep, goats, chickens, horses, ducks, geese",
        "wild animals": "lions, tigers, elephants, wolves, bears, giraffes, zebras, monkeys",
        "birds": "eagles, owls, robins, ducks, parrots, swans, crows, penguins",
        "insects": "ants, bees, butterflies, flies, beetles, crickets, moths",
        "sports": "soccer, tennis, basketball, baseball, swimming, running, golf, hockey, volleyball",
        "drinks": "water, milk, tea, coffee, juice, lemonade, hot chocolate",
        "foods": "bread, rice, pasta, soup, cheese, eggs, fish, pizza, salad",
        "desserts": "cake, ice cream, cookies, pie, pudding, brownies",
        "planets": "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune",
        "countries": "France, Japan, Brazil, Canada, Kenya, India, Italy, Mexico, Egypt, Australia",
        "cities": "London, Paris, New York, Tokyo, Rome, Cairo, Sydney, Berlin, Madrid, Toronto",
        "musical instruments": ("the piano, the guitar, the violin, the drums, the flute, the trumpet, the cello"),
        "school subjects": "math, history, science, English, art, music, geography",
        "jobs": "teacher, doctor, nurse, farmer, cook, driver, engineer, writer, police officer",
        "tools": "a hammer, a saw, a screwdriver, a wrench, a drill, pliers",
        "clothes": "a shirt, pants, a dress, a coat, socks, shoes, a hat",
        "kinds of weather": "sun, rain, snow, wind, fog, storms",
        "hobbies": "reading, painting, gardening, cooking, fishing, hiking, dancing, singing",
        "rooms in a house": "the kitchen, the bedroom, the bathroom, the living room, the dining room",
        "flowers": "roses, tulips, daisies, lilies, sunflowers, violets",
        "trees": "oak, pine, maple, birch, willow, palm",
        "oceans": "the Pacific Ocean, the Atlantic Ocean, the Indian Ocean, the Arctic Ocean",
        "ways to travel": "by car, by train, by bus, by plane, by boat, by bicycle, on foot",
        "things in a kitchen": "a stove, a sink, a pot, a pan, a knife, plates, cups",
        "things in a school": "desks, books, pencils, teachers, students, a blackboard",
        "feelings": "happiness, sadness, anger, fear, surprise, love, pride",
        "metals": "iron, gold, silver, copper, tin, aluminum",
        "shapes": "a circle, a square, a triangle, a rectangle, an oval",
        "languages": "English, Spanish, French, German, Chinese, Arabic, Japanese, Italian",
    }.items()
}

NUMBER_WORDS = words("zero one two three four five six seven eight nine ten")

OPPOSITES = pairs("""
hot/cold big/small up/down in/out fast/slow happy/sad day/night light/dark old/new young/old rich/poor
hard/soft open/closed full/empty wet/dry long/short tall/short high/low early/late good/bad strong/weak
loud/quiet clean/dirty left/right near/far first/last love/hate begin/end buy/sell give/take win/lose
push/pull laugh/cry heavy/light thick/thin wide/narrow easy/difficult safe/dangerous true/false
alive/dead black/white sweet/sour noisy/quiet brave/afraid kind/cruel friend/enemy
""")
PAST_TENSES = pairs("""
go/went eat/ate see/saw run/ran take/took make/made come/came give/gave find/found think/thought
tell/told write/wrote read/read drink/drank sing/sang swim/swam drive/drove fly/flew know/knew grow/grew
buy/bought bring/brought teach/taught catch/caught sleep/slept feel/felt keep/kept leave/left meet/met
pay/paid say/said sell/sold sit/sat stand/stood speak/spoke break/broke choose/chose forget/forgot
begin/began win/won walk/walked play/played jump/jumped talk/talked help/helped
""")
PLURALS = pairs("""
cat/cats dog/dogs child/children man/men woman/women foot/feet tooth/teeth mouse/mice goose/geese
person/people leaf/leaves knife/knives wolf/wolves baby/babies city/cities box/boxes bus/buses fish/fish
sheep/sheep book/books house/houses story/stories
""")
SOUNDS = pairs("""
dog/barks cat/meows cow/moos sheep/bleats duck/quacks lion/roars horse/neighs pig/grunts bee/buzzes
wolf/howls owl/hoots snake/hisses rooster/crows mouse/squeaks frog/croaks
""")
YOUNG = pairs("""
dog/puppy cat/kitten cow/calf sheep/lamb duck/duckling lion/cub horse/foal pig/piglet goat/kid hen/chick
bear/cub frog/tadpole swan/cygnet deer/fawn
""")

LEG_COUNTS = [
    ("dog", 4),
    ("cat", 4),
    ("bird", 2),
    ("spider", 8),
    ("ant", 6),
    ("horse", 4),
    ("chicken", 2),
    ("bee", 6),
    ("cow", 4),
    ("fish", 0),
    ("snake", 0),
    ("person", 2),
    ("butterfly", 6),
    ("octopus", 8),
]
HOMES = [
    ("bird", "in a nest"),
    ("bee", "in a hive"),
    ("fish", "in water"),
    ("spider", "in a web"),
    ("rabbit", "in a burrow"),
    ("bear", "in the forest"),
    ("lion", "in Africa, in the grassland"),
    ("camel", "in the desert"),
    ("penguin", "in cold places in the south"),
    ("frog", "near ponds"),
    ("monkey", "in the trees of the jungle"),
    ("whale", "in the ocean"),
]

DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
NAMES = words("Tom Anna Ben Lucy Sam Mia Jack Emma Leo Rosa Peter Nina Max Clara Ali Maya Omar Lily Hugo Sara")
ANIMALS = words("cat dog rabbit fox bear mouse horse bird lion turtle frog owl elephant monkey duck goat wolf squirrel")
PLACES = phrases("forest, village, garden, city, valley, farm, mountain, small town, castle, park, island")
TOPICS = phrases("""
the sea, the moon, winter, spring, summer, autumn, friendship, love, rain, a tree, the stars, a river,
my mother, the night, a flower, the wind, home, dreams, time, music, hope, the sun, a cat, a dog, snow
""")
ADJECTIVES = words("big old small beautiful quiet strange bright warm new red little happy")
NOUNS = words("""
dog cat house car book tree river school friend ball garden boat bird teacher flower train table king
horse bridge cake window door city
""")
