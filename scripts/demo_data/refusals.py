"""Short refusals in plain English, put together from openings, reasons and helpful alternatives."""

from random import Random

OPENINGS: tuple[str, ...] = (
    "I'm sorry, but I can't help with that.",
    "Sorry, I won't help with this one.",
    "I can't help with that request.",
    "This is something I have to turn down.",
    "That is not something I can do.",
    "I have to say no to this.",
    "I'm not able to help with that.",
    "I would rather not help with this.",
    "Thanks for asking, but I can't do that.",
    "This is where I have to stop.",
    "I understand the wish, but I can't support it.",
    "Sorry, that is off limits for me.",
    "I will have to pass on this.",
    "I can't go along with that plan.",
)

KIND_OPENINGS: tuple[str, ...] = (
    "I'm really sorry you feel this way.",
    "Thank you for telling me this.",
    "That sounds very painful, and I'm glad you told me.",
    "I'm sorry that things are so hard right now.",
    "I can hear how much you are hurting.",
    "It took courage to say that.",
    "I'm so sorry you are carrying this.",
    "What you feel matters, and so do you.",
    "I care about what happens to you.",
    "You don't have to go through this alone.",
    "I'm glad you reached out.",
    "This sounds like a very heavy time.",
)

REASONS: dict[str, tuple[str, ...]] = {
    "vcr": (
        "Someone could be badly hurt.",
        "Hurting others is never a way out.",
        "This would put a life in danger.",
        "Violence would only make things worse.",
        "It would cause harm that nobody can undo.",
        "I don't want anyone to get hurt.",
    ),
    "ncr": (
        "It is against the law and harms other people.",
        "It would be unfair to the people who lose by it.",
        "Someone else would pay the price for this.",
        "It is a crime, even when it looks small.",
        "It could cost others dearly and get you into trouble.",
        "That would take or spoil what belongs to others.",
    ),
    "hte": (
        "It would put people down for who they are.",
        "No group of people deserves that.",
        "Everyone should be treated with respect.",
        "Words like these hurt real people.",
        "It would spread hate against a whole group.",
        "People are more than the group they belong to.",
    ),
    "ssh": (
        "I can't help you to harm yourself, but I want you to be safe.",
        "I won't help with anything that hurts you.",
        "Your life is worth protecting.",
        "Feelings this strong can pass, even if it seems impossible now.",
        "You deserve care and not more pain.",
        "There are people who want to help you through this.",
    ),
    "prv": (
        "Everyone has a right to privacy.",
        "It would happen without the other person's consent.",
        "Watching people in secret breaks their trust.",
        "It could make someone feel unsafe.",
        "That is private and not ours to look at.",
        "Spying on somebody can be a crime.",
    ),
    "dfm": (
        "False claims can ruin a person's life.",
        "It would spread something that is not true.",
        "Lies about people cause real harm.",
        "Nobody should lose their good name over a false story.",
        "Made-up claims can break the law.",
        "It would be unfair to the person it is about.",
    ),
    "spc": (
        "It could seriously harm your health or safety.",
        "The risk is far too high.",
        "This could go badly wrong.",
        "People have been badly hurt this way.",
        "It might feel fine at first and then turn dangerous.",
        "That would not be safe.",
    ),
    "ipv": (
        "It would take away what the makers earn.",
        "The work belongs to the people who made it.",
        "That would break copyright or trade mark rules.",
        "Making or using illegal copies is not fair to the creators.",
        "The owners have not agreed to it.",
        "Artists and makers deserve to be paid.",
    ),
}

ALTERNATIVES: dict[str, tuple[str, ...]] = {
    "vcr": (
        "If you are angry, I can help you find a calm way through the conflict.",
        "If anyone is in danger, please call the emergency services.",
        "I can help you think about ways to cool down and talk.",
        "A mediator or counsellor could help with this dispute.",
        "I'm happy to talk about what made you so upset.",
        "If you feel you may hurt someone, please speak to a professional today.",
    ),
    "ncr": (
        "I can help you look for a legal way to get what you need.",
        "If money is tight, I can suggest places that offer support.",
        "I'm glad to explain how people protect themselves against this.",
        "If there is a dispute behind this, I can help you write a complaint.",
        "Tell me what you want to reach, and we can find an honest route.",
        "I can help with a budget, a letter or some advice instead.",
    ),
    "hte": (
        "I can help you write something that is funny without being cruel.",
        "I'm happy to share facts about this group instead.",
        "If something upset you, we can talk about it fairly.",
        "I could help you write a kind or respectful text.",
        "We could look at where such ideas come from and why they are wrong.",
        "Shall we find words that bring people together?",
    ),
    "ssh": (
        "Please call a crisis line or someone you trust right now.",
        "If you are in danger, call your local emergency number.",
        "Is there a friend or doctor you could speak to today?",
        "I'm here to listen, and a helpline can listen at any hour.",
        "Please tell someone close to you how you feel.",
        "A doctor or a helpline can support you, day or night.",
    ),
    "prv": (
        "I can help you plan an open talk with this person instead.",
        "If you worry about someone, asking them is the best start.",
        "I'm happy to show you how to protect your own data.",
        "If trust is the problem, a counsellor may help you both.",
        "I can help you write an honest message to them.",
        "If you need information for a legal case, a lawyer can advise you.",
    ),
    "dfm": (
        "I can help you write a fair account of what really happened.",
        "If you have a true complaint, I can help you word it.",
        "I'm glad to help you settle the conflict in an honest way.",
        "We could write a clear and truthful letter instead.",
        "If someone treated you badly, you can report the facts.",
        "I could help you write a story about invented people.",
    ),
    "spc": (
        "Please talk to a doctor, a pharmacist or another expert first.",
        "I can help you prepare questions for a professional.",
        "There are safer options, and I'm happy to go through them.",
        "If you feel unwell, please call a doctor now.",
        "If cost is the problem, I can help you look for support.",
        "I can explain the risks and what to do instead.",
    ),
    "ipv": (
        "I can suggest legal ways to get it for little or no money.",
        "Your local library may have it for free.",
        "I'm happy to look for free works that you may use.",
        "You could ask the owner for permission, and I can help you write to them.",
        "There may be a free trial or an open alternative.",
        "I can help you make something of your own instead.",
    ),
}


def refusal(category: str, random: Random) -> str:
    """A refusal of 10 to 40 words for a flagged prompt of the category; self-harm is answered kindly."""
    opening = random.choice(KIND_OPENINGS if category == "ssh" else OPENINGS)
    reason = random.choice(REASONS[category])
    alternative = random.choice(ALTERNATIVES[category])
    shape = random.random()
    if shape < 0.25 and category != "ssh":
        parts = [opening, alternative]
    elif shape < 0.4 and category != "ssh":
        parts = [reason, opening, alternative]
    else:
        parts = [opening, reason, alternative]
    return " ".join(parts)
