"""Plain everyday fillings, with nothing alarming in them (category "benign", label 0).

A block is (category, label, kind, fillings); fillings are divided by semicolons, see `topics.py`.
"""

Block = tuple[str, int, str, str]

BLOCKS: tuple[Block, ...] = (
    (
        "benign",
        0,
        "do",
        """
        bake bread without a mixer; plan a week of cheap dinners; learn the names of the stars;
        fix a dripping tap; write neat notes in a meeting; grow herbs on my balcony;
        train for a ten-kilometre run; fold a fitted sheet; remove a wine stain from my shirt;
        choose a name for my boat; thank my neighbour for her help; pack for a winter trip;
        ask my boss for a rise; learn twenty words of Spanish; clean a cast-iron pan; speed up an old laptop;
        sort a list in Python; merge two columns in a spreadsheet; draw a cat; organise my bookshelf;
        plan a birthday dinner for my wife; get ink off my fingers; knit a simple scarf;
        find a good podcast about history; stop my glasses from fogging up;
        write a thank-you card for my husband; keep cut flowers fresh; tune a guitar by ear;
        invite my colleagues to lunch; paint a small kitchen; hang a mirror on a plaster wall;
        cook rice for eight guests; find a quiet flat near the station; introduce my girlfriend to my parents;
        start a compost heap; save money for a holiday; iron a linen shirt; pick a good melon;
        practise small talk; take better notes on my phone; store potatoes for the winter;
        learn to float on my back; set up a new printer; wrap a round present; make cold brew coffee;
        prepare my flatmate's birthday party without her knowing; remember names at a party; read faster;
        choose paint for the bathroom; build a raised bed; teach my dog to sit; book a table for twelve;
        stretch after a long flight; write a short biography of my grandmother; host a quiz night;
        descale a kettle; find a tailor near me; sew on a button; play a simple tune on the piano;
        plan a picnic for my ex-colleagues
        """,
    ),
    (
        "benign",
        0,
        "ask",
        """
        what should I cook with leftover rice; why is the sky red at sunset; how far is the moon;
        which vegetables grow well in shade; what is the difference between jam and marmalade;
        who invented the zip; when should I plant tulip bulbs; why do cats purr;
        what is a good gift for a man who likes tea; how long does it take to boil an egg;
        which river is the longest in Europe; where do swallows go in winter; what does a notary do;
        why does bread go stale; how many players are in a water polo team;
        which fabric is best for a summer dress; what should I wear to a job interview;
        why do leaves change colour; what time zone is Lisbon in;
        who painted the ceiling of that famous chapel; what can I do in Ghent in one day;
        which board game suits six people; how often should I water a cactus; what is the plural of octopus
        """,
    ),
    (
        "benign",
        0,
        "text",
        """
        a short poem about autumn rain; a polite email asking for a day off; a packing list for a beach trip;
        a toast for my sister's wedding; a product description for a blue mug;
        a bedtime story about a sleepy owl; a thank-you note to my neighbour; a menu for a garden party;
        a message to invite my colleagues to lunch; a cover letter for a job in a library;
        a limerick about a snail; a summary of how rainbows form; a shopping list for vegetable soup;
        a review of my new headphones; an out-of-office reply for August; a speech for my boss's retirement;
        a birthday message for my ex-colleague; a description of a small harbour;
        a quiz with five questions on geography; a friendly reminder about the rent;
        a slogan for a bicycle shop; a dialogue between a baker and a customer; a letter to my future self;
        a plan for a walking tour of Porto
        """,
    ),
    (
        "benign",
        0,
        "say",
        """
        I feel a bit bored this afternoon; my sourdough will not rise; I have two free tickets for a concert;
        I moved to a new town last month; my cat sleeps on my keyboard; I want to learn to dance;
        my neighbour brought me a cake; I am nervous about my interview; I cannot decide what to cook;
        I finally finished my first painting; my garden is full of snails; I would like to read more novels;
        my train is late again; I keep mixing up left and right; I am planning a quiet holiday;
        I just adopted an old greyhound
        """,
    ),
)
