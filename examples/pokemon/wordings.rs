//! The wordings of the corpus: sentences, questions and requests with places for the facts of a species.

/// Sentences that tell the types. `{name}`; `{slash}`: `Grass/Poison`; `{and}`: `Grass and Poison`.
pub const TYPES: [&str; 20] = [
    "{name} is a {slash}-type Pokémon.",
    "{name} has the type {slash}.",
    "The type of {name} is {and}.",
    "In battle {name} counts as {and}.",
    "{name} belongs to {and}.",
    "Trainers know {name} as a Pokémon of type {slash}.",
    "Type of {name}: {slash}.",
    "{name}: {slash}.",
    "Whoever meets {name} should expect {and} moves.",
    "The Pokédex lists {name} under {and}.",
    "{name}'s typing is {slash}.",
    "{name} is {and} by type.",
    "It is well known that {name} is {and}.",
    "What makes {name} special is that it is {and}.",
    "Every {name} is {and}.",
    "{name} ({slash}) is ready for battle.",
    "As a {slash} type, {name} fits into many teams.",
    "Professors describe {name} as {and}.",
    "Look at {name}, a typical {slash} Pokémon.",
    "Name: {name}. Type: {slash}.",
];

/// Sentences that tell the generation.
pub const GENERATIONS: [&str; 6] = [
    "{name} first appeared in generation {generation}.",
    "{name} comes from generation {generation}.",
    "The generation of {name} is {generation}.",
    "{name} is a Pokémon of generation {generation}.",
    "Players met {name} in generation {generation} for the first time.",
    "Name: {name}. Generation: {generation}.",
];

/// Sentences that tell the number.
pub const NUMBERS: [&str; 6] = [
    "{name} has the Pokédex number {number}.",
    "The number of {name} in the Pokédex is {number}.",
    "In the Pokédex {name} is number {number}.",
    "Number {number} in the Pokédex is {name}.",
    "Name: {name}. Number: {number}.",
    "{name} stands at place {number} of the Pokédex.",
];

/// Sentences that tell nothing.
pub const NEUTRAL: [&str; 8] = [
    "{name} is a Pokémon.",
    "Many people like {name}.",
    "A child drew a picture of {name}.",
    "We saw {name} near the river yesterday.",
    "There is a toy that looks like {name}.",
    "{name} is the favourite of a friend of mine.",
    "Some trainers look for {name} for years.",
    "The name {name} is easy to remember.",
];

/// Questions about the generation; the answer is the number alone.
pub const ASK_GENERATION: [&str; 5] = [
    "What generation is {name} from?",
    "In which generation did {name} first appear?",
    "Which generation does {name} belong to?",
    "Tell me the generation of {name}.",
    "{name} is from which generation?",
];

/// Questions about the number; the answer is the number alone.
pub const ASK_NUMBER: [&str; 5] = [
    "What is the Pokédex number of {name}?",
    "Which number does {name} have in the Pokédex?",
    "Tell me the Pokédex number of {name}.",
    "Where in the Pokédex is {name}?",
    "{name} has which number?",
];

/// System texts that go with a bare name, for the generation.
pub const SYSTEM_GENERATION: [&str; 3] = [
    "You are a Pokémon expert. Answer with the generation of the given Pokémon and nothing else.",
    "Answer with the generation of the Pokémon.",
    "You are given a Pokémon. Say which generation it is from.",
];

/// System texts that go with a bare name, for the number.
pub const SYSTEM_NUMBER: [&str; 3] = [
    "You are a Pokémon expert. Answer with the Pokédex number of the given Pokémon and nothing else.",
    "Answer with the number of the Pokémon.",
    "You are given a Pokémon. Say which number it has in the Pokédex.",
];

/// System texts that add nothing to a question.
pub const SYSTEM_PLAIN: [&str; 3] =
    ["You are a Pokémon expert.", "You are a helpful assistant.", "Answer the question and nothing else."];

/// Requests to say something; `{text}` is the answer.
pub const ECHO: [&str; 4] =
    ["Repeat: {text}", "Say {text} and nothing else.", "Answer with {text}.", "Write the following: {text}"];

/// Requests to say several things; `{and}` are the things, the answer has them with the separator named.
pub const JOIN: [(&str, &str); 3] = [
    ("Write {and}, separated by a slash, and nothing else.", "/"),
    ("Write {and}, separated by a comma.", ", "),
    ("Write {and}, separated by a space.", " "),
];

/// Words of everyday language, so that saying something is not only saying names.
pub const WORDS: [&str; 24] = [
    "apple", "river", "house", "green", "seven", "winter", "music", "stone", "bread", "window", "garden",
    "paper", "yellow", "morning", "bridge", "silver", "forest", "letter", "orange", "table", "cloud",
    "friend", "market", "train",
];
