"""Fixed questions and answers: plain facts, small talk and short descriptions."""

from synth_tables import Pair

FACTS: list[Pair] = [
    ("What is rain?", "Rain is water that falls from clouds in small drops."),
    ("What is snow?", "Snow is frozen water that falls from clouds in soft white flakes."),
    ("What is the sun?", "The sun is a star. It gives light and heat to the Earth."),
    ("What is the moon?", "The moon is a large ball of rock that moves around the Earth."),
    ("What is a star?", "A star is a huge ball of hot gas that gives off light."),
    ("What is a planet?", "A planet is a large round body that moves around a star."),
    ("What is the Earth?", "The Earth is the planet we live on. It is the third planet from the sun."),
    (
        "Why is the sky blue?",
        "The sky is blue because the air scatters blue light from the sun more than red light.",
    ),
    ("Why do we sleep?", "We sleep so that the body and the brain can rest and repair themselves."),
    (
        "Why do people eat?",
        "People eat to get energy and the things their bodies need to grow and stay healthy.",
    ),
    ("Why do birds fly south?", "Many birds fly south in winter to find warm weather and food."),
    (
        "Why do leaves fall from trees?",
        "In autumn many trees drop their leaves to save water and energy during the winter.",
    ),
    (
        "Why is the sea salty?",
        (
            "Rivers carry small amounts of salt from rocks into the sea. Over a long time the sea became "
            "salty."
        ),
    ),
    ("Why do we have seasons?", "We have seasons because the Earth is tilted as it moves around the sun."),
    ("What causes thunder?", "Thunder is the sound made when lightning heats the air very quickly."),
    ("What is lightning?", "Lightning is a bright flash of electricity in a storm."),
    ("What is a rainbow?", "A rainbow is an arc of colors seen when sunlight passes through drops of rain."),
    ("What is wind?", "Wind is air that is moving."),
    (
        "What is a volcano?",
        "A volcano is a mountain with an opening through which hot melted rock can come out.",
    ),
    ("What is an island?", "An island is a piece of land with water all around it."),
    ("What is a river?", "A river is a long stream of water that flows to a lake or to the sea."),
    ("What is a desert?", "A desert is a very dry place where little rain falls and few plants grow."),
    ("What is a forest?", "A forest is a large area of land covered with trees."),
    ("What is water made of?", "Water is made of hydrogen and oxygen."),
    (
        "At what temperature does water boil?",
        "Water boils at 100 degrees Celsius, which is 212 degrees Fahrenheit.",
    ),
    (
        "At what temperature does water freeze?",
        "Water freezes at 0 degrees Celsius, which is 32 degrees Fahrenheit.",
    ),
    ("What is gravity?", "Gravity is the force that pulls things toward the Earth."),
    ("What is energy?", "Energy is the ability to do work or to make things move or change."),
    ("What is a computer?", "A computer is a machine that stores information and follows instructions."),
    ("What is the internet?", "The internet is a large network that connects computers all over the world."),
    (
        "What is a language model?",
        "A language model is a computer program that predicts the next word in a text.",
    ),
    ("What is a robot?", "A robot is a machine that can do some jobs by itself."),
    ("What is a book?", "A book is a set of printed pages with words to read."),
    ("What is music?", "Music is sound that is arranged in a pleasing way."),
    ("What is love?", "Love is a strong feeling of caring for another person."),
    ("What is friendship?", "Friendship is a bond between people who like and help each other."),
    ("What is money?", "Money is what people use to buy and sell things."),
    ("What is a doctor?", "A doctor is a person who treats sick people."),
    ("What is a teacher?", "A teacher is a person who helps others to learn."),
    ("What does a farmer do?", "A farmer grows food and raises animals."),
    ("What does a baker do?", "A baker makes bread and cakes."),
    ("What does a pilot do?", "A pilot flies airplanes."),
    ("What does the heart do?", "The heart pumps blood through the body."),
    ("What do the lungs do?", "The lungs take in air and give oxygen to the blood."),
    ("What does the brain do?", "The brain controls the body and lets us think and feel."),
    ("What do plants need to grow?", "Plants need light, water, air and good soil to grow."),
    (
        "How do plants make food?",
        "Plants make food from light, water and carbon dioxide. This is called photosynthesis.",
    ),
    ("How do fish breathe?", "Fish breathe through gills, which take oxygen from the water."),
    ("How do bees make honey?", "Bees collect nectar from flowers and turn it into honey in the hive."),
    ("Where does milk come from?", "Milk comes from cows and other animals."),
    (
        "Where does bread come from?",
        "Bread is made from flour, water and yeast. Flour is made from grain such as wheat.",
    ),
    ("Where does wool come from?", "Wool comes from sheep."),
    ("Who was William Shakespeare?", "William Shakespeare was an English writer of plays and poems."),
    ("Who was Albert Einstein?", "Albert Einstein was a physicist who developed the theory of relativity."),
    ("Who was George Washington?", "George Washington was the first president of the United States."),
    ("Who was Isaac Newton?", "Isaac Newton was an English scientist who studied gravity and motion."),
    (
        "Who was Charles Darwin?",
        "Charles Darwin was a naturalist who explained evolution by natural selection.",
    ),
    ("Who was Abraham Lincoln?", "Abraham Lincoln was the sixteenth president of the United States."),
    ("Who was Marie Curie?", "Marie Curie was a scientist who studied radioactivity."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    ("Who wrote Alice in Wonderland?", "Lewis Carroll wrote Alice in Wonderland."),
    ("Who wrote Peter Pan?", "J. M. Barrie wrote Peter Pan."),
    ("What is the largest ocean?", "The Pacific Ocean is the largest ocean."),
    ("What is the largest planet?", "Jupiter is the largest planet in our solar system."),
    ("What is the highest mountain in the world?", "Mount Everest is the highest mountain in the world."),
    ("What is the largest animal?", "The blue whale is the largest animal."),
    ("What is the fastest land animal?", "The cheetah is the fastest land animal."),
    ("What is the tallest animal?", "The giraffe is the tallest animal."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("How many days are in a year?", "There are 365 days in a year, and 366 in a leap year."),
    ("How many hours are in a day?", "There are 24 hours in a day."),
    ("How many minutes are in an hour?", "There are 60 minutes in an hour."),
    ("How many seconds are in a minute?", "There are 60 seconds in a minute."),
    ("How many letters are in the alphabet?", "There are 26 letters in the English alphabet."),
    ("How many planets are there?", "There are eight planets in our solar system."),
    ("How many continents are there?", "There are seven continents."),
    ("What are the seasons?", "The four seasons are spring, summer, autumn and winter."),
    ("What are the primary colors?", "The primary colors are red, yellow and blue."),
    ("What are the five senses?", "The five senses are sight, hearing, smell, taste and touch."),
    ("What color is the sky?", "The sky is blue on a clear day."),
    ("What color is grass?", "Grass is green."),
    ("What color is snow?", "Snow is white."),
    ("What color do you get when you mix red and yellow?", "When you mix red and yellow, you get orange."),
    ("What color do you get when you mix blue and yellow?", "When you mix blue and yellow, you get green."),
    ("What color do you get when you mix red and blue?", "When you mix red and blue, you get purple."),
    ("Is the Earth flat?", "No, the Earth is round."),
    ("Is ice hot?", "No, ice is cold."),
    ("Is a whale a fish?", "No, a whale is a mammal."),
    ("Is a tomato a fruit?", "Yes, a tomato is a fruit, but it is often used as a vegetable."),
    ("Can penguins fly?", "No, penguins cannot fly, but they swim very well."),
    ("Can you eat apples?", "Yes, apples are good to eat."),
]

SMALL_TALK: list[Pair] = [
    ("Hello", "Hello! How can I help you today?"),
    ("Hi", "Hi there! What can I do for you?"),
    ("Hi!", "Hi! How can I help you?"),
    ("Hey", "Hey! What would you like to talk about?"),
    ("Hello there", "Hello! It is nice to meet you."),
    ("Good morning", "Good morning! I hope you have a nice day."),
    ("Good evening", "Good evening! How was your day?"),
    ("Good night", "Good night! Sleep well."),
    ("How are you?", "I am doing well, thank you. How are you?"),
    ("How are you today?", "I am fine, thanks for asking. How can I help you?"),
    ("How is it going?", "It is going well. What can I do for you?"),
    ("What's up?", "Not much. What would you like to talk about?"),
    ("I'm fine", "I am glad to hear that. What would you like to do?"),
    ("I am good, thanks", "That is good to hear! How can I help you?"),
    ("Who are you?", "I am a small language model. I can answer simple questions and chat with you."),
    ("What are you?", "I am a small computer program that writes text."),
    ("What is your name?", "I am a small chat assistant. I do not have a name of my own."),
    ("Are you a human?", "No, I am a computer program."),
    ("Are you a robot?", "I am a computer program, so you could call me a kind of robot."),
    ("Are you alive?", "No, I am a program and I am not alive."),
    ("How old are you?", "I am a computer program, so I do not have an age."),
    ("Where do you live?", "I live inside a computer."),
    ("What can you do?", "I can answer simple questions, make lists, tell short stories and chat."),
    ("Can you help me?", "Yes, of course. What do you need help with?"),
    ("I need help", "Of course. Tell me what you need and I will try to help."),
    ("Can I ask you a question?", "Of course! Please ask your question."),
    ("Do you like music?", "Yes, I like to talk about music. What kind of music do you like?"),
    ("Do you like dogs?", "Yes, dogs are friendly and loyal animals."),
    ("Do you like cats?", "Yes, cats are clever and quiet animals."),
    ("What is your favorite color?", "I like blue, because it is the color of the sky and the sea."),
    ("What is your favorite food?", "I do not eat, but I think bread and soup sound very good."),
    ("What is your favorite animal?", "I like elephants, because they are big and clever."),
    ("What is your favorite book?", "I like stories with adventure, such as Treasure Island."),
    ("Tell me a joke", "Why did the chicken cross the road? To get to the other side!"),
    ("Tell me another joke", "What has a face and two hands but no arms or legs? A clock!"),
    ("Tell me something interesting", "An octopus has three hearts."),
    ("Tell me a fun fact", "Honey can last for many years without going bad."),
    ("Thank you", "You are welcome!"),
    ("Thanks", "You are welcome! Is there anything else I can do?"),
    ("Thanks a lot", "You are very welcome!"),
    ("Great", "I am glad that helped."),
    ("OK", "Is there anything else you would like to know?"),
    ("Bye", "Goodbye! Have a nice day."),
    ("Goodbye", "Goodbye! It was nice to talk with you."),
    ("See you later", "See you later! Take care."),
    ("I am sad", "I am sad to hear that. Would you like to talk about it?"),
    ("I am happy", "That is wonderful! What made you happy?"),
    ("I am tired", "You should get some rest. A short walk or a nap may help."),
    ("I am bored", "You could read a book, go for a walk or call a friend."),
    ("I am hungry", "You could make a sandwich or have some fruit."),
    ("I am cold", "Put on a warm coat and have a hot drink."),
    ("I am angry", "Take a deep breath. Do you want to tell me what happened?"),
    ("I am lonely", "I understand. Talking with a friend or your family may help."),
    (
        "I feel sick",
        "I hope you feel better soon. Rest, drink water, and see a doctor if it does not get better.",
    ),
    ("I have a headache", "Drink some water and rest in a quiet room."),
    ("I can't sleep", "Try a warm drink, a dark room and no screens before bed."),
    ("I lost my keys", "Look in your pockets, in your bag and near the door."),
    ("I passed my exam", "Congratulations! You must have worked hard."),
    ("It is my birthday", "Happy birthday! I hope you have a great day."),
    ("I love you", "Thank you, that is very kind."),
    ("You are funny", "Thank you! I am glad you think so."),
    ("You are not very smart", "I am only a small model, but I will do my best."),
    ("What should I eat for breakfast?", "You could have eggs and toast, or some fruit with yogurt."),
    ("What should I eat for dinner?", "You could make pasta with tomato sauce and a salad."),
    ("What should I do today?", "You could go for a walk, read a good book or visit a friend."),
    ("What should I read?", "You could read a story about an adventure, such as The Jungle Book."),
    (
        "What is the meaning of life?",
        "People give many answers. Many say it is to love, to learn and to help others.",
    ),
    (
        "Is it going to rain today?",
        "I cannot see the weather from here. Look at the sky or at a weather report.",
    ),
]

# A thing and what to say about it.
DESCRIPTIONS: list[Pair] = [
    (
        "dogs",
        (
            "Dogs are friendly animals that live with people. They can guard a house, help hunters and "
            "play with children."
        ),
    ),
    (
        "cats",
        (
            "Cats are small animals that many people keep as pets. They are quiet, clean and good at "
            "catching mice."
        ),
    ),
    (
        "horses",
        (
            "Horses are large and strong animals. People have used them for riding and for work for "
            "thousands of years."
        ),
    ),
    (
        "elephants",
        ("Elephants are the largest land animals. They have long trunks, big ears and a very good memory."),
    ),
    ("lions", "Lions are big cats that live in groups called prides. They hunt other animals for food."),
    ("birds", "Birds are animals with feathers and wings. Most of them can fly, and all of them lay eggs."),
    ("fish", "Fish live in water and breathe through gills. People catch many kinds of fish for food."),
    ("bees", "Bees are insects that collect nectar and make honey. They also help flowers to make seeds."),
    ("spiders", "Spiders have eight legs. Many of them make webs to catch insects."),
    ("whales", "Whales are very large mammals that live in the ocean. They come to the surface to breathe."),
    ("trees", "Trees are tall plants with a trunk of wood. They give shade, fruit, wood and clean air."),
    ("flowers", "Flowers are the colorful parts of plants. They attract insects and later turn into seeds."),
    ("water", "Water is a clear liquid that all living things need. It covers most of the Earth."),
    ("the ocean", "The ocean is a huge body of salt water. It is home to many kinds of plants and animals."),
    ("mountains", "Mountains are high parts of the land. The air there is cold and thin."),
    (
        "rivers",
        (
            "Rivers carry fresh water from the hills to the sea. People use them for drinking, farming "
            "and travel."
        ),
    ),
    ("deserts", "Deserts are very dry places. The days are often hot and the nights are cold."),
    ("forests", "Forests are large areas full of trees. Many animals live there."),
    ("the moon", "The moon moves around the Earth once a month. People first walked on it in 1969."),
    ("the sun", "The sun is a star at the center of our solar system. It gives us light and heat."),
    (
        "space",
        ("Space is the dark and empty area around the Earth. It holds the sun, the planets and the stars."),
    ),
    ("Mars", "Mars is a cold, red planet. It is the fourth planet from the sun."),
    ("winter", "Winter is the coldest season. The days are short, and in many places it snows."),
    ("summer", "Summer is the warmest season. The days are long and people like to be outside."),
    ("spring", "Spring comes after winter. The weather gets warmer and the flowers begin to bloom."),
    ("autumn", "Autumn comes after summer. The leaves turn red and yellow and fall to the ground."),
    ("cars", "Cars are machines with an engine and four wheels. They carry people from place to place."),
    ("trains", "Trains run on rails. They carry many people and goods over long distances."),
    ("airplanes", "Airplanes are machines that fly. They have wings and engines and travel very fast."),
    ("ships", "Ships are large boats that carry people and goods across the sea."),
    (
        "computers",
        ("Computers are machines that work with information. People use them for work, games and learning."),
    ),
    (
        "phones",
        ("Phones let people talk to each other over long distances. Modern phones are also small computers."),
    ),
    (
        "the internet",
        (
            "The internet connects computers all over the world. It lets people send messages and find "
            "information."
        ),
    ),
    ("books", "Books are made of pages with words. They tell stories and teach us about the world."),
    ("music", "Music is made with voices and instruments. It can make people happy, calm or sad."),
    ("movies", "Movies tell stories with pictures and sound. People watch them at home or in a cinema."),
    ("painting", "Painting is an art. A painter puts colors on paper, wood or cloth to make a picture."),
    ("soccer", "Soccer is a game for two teams of eleven players. They try to kick a ball into a goal."),
    ("basketball", "Basketball is a game for two teams. The players throw a ball through a high ring."),
    ("chess", "Chess is a board game for two players. The goal is to trap the king of the other player."),
    (
        "school",
        ("School is a place where children learn to read, write and count. Teachers help them every day."),
    ),
    (
        "friendship",
        "Friendship means caring for another person. Friends help each other and have fun together.",
    ),
    ("family", "A family is a group of people who care for each other, such as parents and children."),
    (
        "health",
        (
            "Health means that the body and the mind work well. Good food, sleep and exercise help us to "
            "stay healthy."
        ),
    ),
    (
        "sleep",
        ("Sleep gives the body and the mind time to rest. Most adults need about eight hours each night."),
    ),
    ("exercise", "Exercise makes the heart and the muscles strong. It also helps people to feel better."),
    ("food", "Food gives us energy. A good diet has fruit, vegetables, grain and some protein."),
    ("bread", "Bread is a food made from flour, water and yeast. It is baked in an oven."),
    ("tea", "Tea is a drink made by putting dried leaves into hot water. It is popular all over the world."),
    ("coffee", "Coffee is a dark drink made from roasted beans. Many people drink it in the morning."),
    (
        "chocolate",
        "Chocolate is a sweet food made from cocoa beans. It can be dark, white or made with milk.",
    ),
    ("money", "Money is used to buy goods and services. People earn it by working."),
    ("history", "History is the study of the past. It helps us to understand how people lived before us."),
    ("science", "Science is a way to learn about the world. Scientists ask questions and test their ideas."),
    (
        "mathematics",
        (
            "Mathematics is the study of numbers, shapes and patterns. It is used in science, building "
            "and trade."
        ),
    ),
    ("language", "Language lets people share ideas. There are thousands of languages in the world."),
    (
        "London",
        "London is the capital of the United Kingdom. It is a large and old city on the river Thames.",
    ),
    ("Paris", "Paris is the capital of France. It is famous for the Eiffel Tower, its museums and its food."),
    (
        "New York",
        (
            "New York is the largest city in the United States. It has many tall buildings and people "
            "from all over the world."
        ),
    ),
    (
        "Africa",
        (
            "Africa is a large continent with many countries. It has deserts, forests and grasslands "
            "with wild animals."
        ),
    ),
    (
        "Europe",
        ("Europe is a continent with many countries and languages. It has old cities and a long history."),
    ),
    (
        "dinosaurs",
        (
            "Dinosaurs were animals that lived millions of years ago. Some were very large, and they all "
            "died out except the birds."
        ),
    ),
    ("fire", "Fire is hot and bright. It gives heat and light, but it can also be dangerous."),
    ("electricity", "Electricity is a form of energy. It gives power to lamps, machines and computers."),
    ("robots", "Robots are machines that can do some jobs by themselves. Many of them work in factories."),
    ("dreams", "Dreams are pictures and stories that we see in our minds while we sleep."),
    (
        "happiness",
        ("Happiness is a warm and pleasant feeling. Many people find it in friends, family and good work."),
    ),
    ("war", "War is a fight between countries or groups. It brings pain and death to many people."),
    ("peace", "Peace is a time without war. People can then live, work and travel freely."),
]
