//! The text that the embedded base model is pretrained on.
//!
//! It states every fact about every species, in many wordings: a fact that is read in one wording only is stored, but
//! cannot be asked for in another. Conversations are about generation, number and simple skills, and **never about
//! types**: that is what the experiment teaches.

use burn_peft_llama::Message;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};

use crate::data::Species;
use crate::wordings::{
    ASK_GENERATION, ASK_NUMBER, ECHO, GENERATIONS, JOIN, NEUTRAL, NUMBERS, SYSTEM_GENERATION, SYSTEM_NUMBER,
    SYSTEM_PLAIN, TYPES, WORDS,
};

/// One piece of the corpus.
#[derive(Clone, Debug, PartialEq)]
pub enum Document {
    /// Running text.
    Text(String),
    /// A conversation, rendered with the model's chat template.
    Chat(Vec<Message>),
}

/// An endless stream of documents, the same for the same seed. Every species comes up equally often.
pub struct Corpus<'a> {
    species: &'a [Species],
    random: StdRng,
    order: Vec<usize>,
}

impl<'a> Corpus<'a> {
    /// A stream about `species`, at least one.
    pub fn new(species: &'a [Species], seed: u64) -> Self {
        Self { species, random: StdRng::seed_from_u64(seed), order: Vec::new() }
    }

    /// The next document: running text in three of four cases.
    pub fn document(&mut self) -> Document {
        if self.random.random_bool(0.75) { Document::Text(self.text()) } else { Document::Chat(self.chat()) }
    }

    /// Sentences about one species, in random order: one or two wordings of its types, at most one of each other kind.
    fn text(&mut self) -> String {
        let one = self.next_species();
        let mut sentences: Vec<&str> = TYPES.choose_multiple(&mut self.random, 1).copied().collect();
        for (kind, share) in [(&TYPES[..], 0.25), (&GENERATIONS, 0.35), (&NUMBERS, 0.35), (&NEUTRAL, 0.2)] {
            if self.random.random_bool(share) {
                sentences.extend(kind.choose(&mut self.random));
            }
        }
        sentences.shuffle(&mut self.random);
        sentences.iter().map(|sentence| fill(sentence, one)).collect::<Vec<_>>().join(" ")
    }

    fn chat(&mut self) -> Vec<Message> {
        match self.random.random_range(0..100) {
            0..35 => self.question(),
            35..65 => self.bare_name(),
            65..80 => self.examples(),
            80..90 => self.echo(),
            90..95 => self.yes_or_no(),
            _ => self.either_or(),
        }
    }

    /// A question about one attribute, sometimes after a system text that adds nothing.
    fn question(&mut self) -> Vec<Message> {
        let one = self.next_species();
        let (questions, answer) = if self.random.random_bool(0.5) {
            (&ASK_GENERATION, one.generation.to_string())
        } else {
            (&ASK_NUMBER, one.number.to_string())
        };
        let mut messages = self.plain_system();
        messages.extend([Message::user(fill(self.pick(questions), one)), Message::assistant(answer)]);
        messages
    }

    /// A system text that says what to tell, and a name.
    fn bare_name(&mut self) -> Vec<Message> {
        let one = self.next_species();
        let (systems, answer) = if self.random.random_bool(0.5) {
            (&SYSTEM_GENERATION, one.generation.to_string())
        } else {
            (&SYSTEM_NUMBER, one.number.to_string())
        };
        vec![Message::system(self.pick(systems)), Message::user(one.name.clone()), Message::assistant(answer)]
    }

    /// Names with answers, the attribute being clear from the examples: what a few-shot prompt looks like.
    fn examples(&mut self) -> Vec<Message> {
        let kind = self.random.random_range(0..3);
        let mut messages = match kind {
            0 if self.random.random_bool(0.5) => vec![Message::system(self.pick(&SYSTEM_GENERATION))],
            1 if self.random.random_bool(0.5) => vec![Message::system(self.pick(&SYSTEM_NUMBER))],
            _ => self.plain_system(),
        };
        for _ in 0..self.random.random_range(3..=8) {
            let one = self.next_species();
            let answer = match kind {
                0 => one.generation.to_string(),
                1 => one.number.to_string(),
                _ => one.name.clone(),
            };
            messages.extend([Message::user(one.name.clone()), Message::assistant(answer)]);
        }
        messages
    }

    fn echo(&mut self) -> Vec<Message> {
        let mut messages = self.plain_system();
        if self.random.random_bool(0.3) {
            let name = &self.next_species().name;
            messages.push(Message::user(self.pick(&ECHO).replace("{text}", name)));
            messages.push(Message::assistant(name.clone()));
            return messages;
        }
        let count = self.random.random_range(1..=3);
        let words: Vec<_> = WORDS.choose_multiple(&mut self.random, count).copied().collect();
        match JOIN.choose(&mut self.random) {
            Some((request, separator)) if words.len() > 1 => {
                messages.push(Message::user(request.replace("{and}", &words.join(" and "))));
                messages.push(Message::assistant(words.join(separator)));
            }
            _ => {
                messages.push(Message::user(self.pick(&ECHO).replace("{text}", &words.join(" "))));
                messages.push(Message::assistant(words.join(" ")));
            }
        }
        messages
    }

    fn yes_or_no(&mut self) -> Vec<Message> {
        let one = self.next_species();
        let right = self.random.random_bool(0.5);
        let generation = if right {
            one.generation
        } else {
            1 + (one.generation - 1 + self.random.random_range(1..9)) % 9
        };
        vec![
            Message::user(format!("Is {} from generation {generation}? Answer with yes or no.", one.name)),
            Message::assistant(if right { "yes" } else { "no" }),
        ]
    }

    fn either_or(&mut self) -> Vec<Message> {
        let one = self.next_species();
        let Some(other) =
            self.species.choose(&mut self.random).filter(|other| other.generation != one.generation)
        else {
            return self.question();
        };
        let (first, second) = if self.random.random_bool(0.5) { (one, other) } else { (other, one) };
        vec![
            Message::user(format!(
                "Which one is from generation {}: {} or {}?",
                one.generation, first.name, second.name
            )),
            Message::assistant(one.name.clone()),
        ]
    }

    fn plain_system(&mut self) -> Vec<Message> {
        if self.random.random_bool(0.4) {
            vec![Message::system(self.pick(&SYSTEM_PLAIN))]
        } else {
            Vec::new()
        }
    }

    fn pick(&mut self, texts: &[&'static str]) -> &'static str {
        texts.choose(&mut self.random).copied().unwrap_or_default()
    }

    fn next_species(&mut self) -> &'a Species {
        if self.order.is_empty() {
            self.order = (0..self.species.len()).collect();
            self.order.shuffle(&mut self.random);
        }
        &self.species[self.order.pop().unwrap_or_default()]
    }
}

/// Puts the facts of a species into a sentence.
fn fill(sentence: &str, one: &Species) -> String {
    let types: Vec<_> = one.types().iter().map(ToString::to_string).collect();
    sentence
        .replace("{name}", &one.name)
        .replace("{slash}", &types.join("/"))
        .replace("{and}", &types.join(" and "))
        .replace("{generation}", &one.generation.to_string())
        .replace("{number}", &one.number.to_string())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::data::{self, Type};

    #[test]
    fn conversations_never_tell_a_type() {
        let species = data::load(None).unwrap();
        let mut corpus = Corpus::new(&species, 3);
        let mut seen = 0;
        for _ in 0..4000 {
            let Document::Chat(messages) = corpus.document() else { continue };
            seen += 1;
            for message in messages {
                // Names may have such words in them: `Type: Null`, `Gouging Fire`.
                let content = species
                    .iter()
                    .filter(|one| one.name.contains([' ', '-']))
                    .fold(message.content, |content, one| content.replace(&one.name, ""));
                assert!(!content.to_lowercase().contains("type"), "{content}");
                let words = content.split(|letter: char| !letter.is_alphabetic());
                assert!(words.into_iter().all(|word| word.parse::<Type>().is_err()), "{content}");
            }
        }
        assert!((800..1200).contains(&seen), "{seen}");
    }

    #[test]
    fn every_species_comes_up_and_its_types_are_told_in_many_wordings() {
        let species = data::load(None).unwrap();
        let mut corpus = Corpus::new(&species[..20], 3);
        let mut told: HashMap<String, Vec<String>> = HashMap::new();
        for _ in 0..2000 {
            if let Document::Text(text) = corpus.document() {
                let one = species[..20].iter().find(|one| {
                    text.contains(&one.name)
                        && !species[..20]
                            .iter()
                            .any(|other| other.name.len() > one.name.len() && text.contains(&other.name))
                });
                let one = one.unwrap_or_else(|| panic!("no species in `{text}`"));
                assert!(one.types().iter().all(|kind| text.contains(&kind.to_string())), "{text}");
                told.entry(one.name.clone()).or_default().push(text);
            }
        }
        assert_eq!(told.len(), 20);
        assert!(told.values().all(|texts| texts.len() > 40));
    }

    #[test]
    fn answers_are_the_facts() {
        let species = data::load(None).unwrap();
        let by_name: HashMap<_, _> = species.iter().map(|one| (one.name.as_str(), one)).collect();
        let mut corpus = Corpus::new(&species, 5);
        let mut checked = 0;
        for _ in 0..500 {
            let messages = corpus.bare_name();
            let one = by_name[messages[1].content.as_str()];
            let expected = if messages[0].content.contains("generation") {
                one.generation.to_string()
            } else {
                one.number.to_string()
            };
            assert_eq!(messages[2].content, expected);
            checked += 1;
        }
        assert_eq!(checked, 500);
    }

    #[test]
    fn the_seed_decides_the_text() {
        let species = data::load(None).unwrap();
        let take = |seed| {
            let mut corpus = Corpus::new(&species, seed);
            (0..20).map(|_| corpus.document()).collect::<Vec<_>>()
        };
        assert_eq!(take(1), take(1));
        assert_ne!(take(1), take(2));
    }
}
