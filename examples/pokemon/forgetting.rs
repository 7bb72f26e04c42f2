//! What else the model could do, asked before and after fine-tuning.

use anyhow::Result;
use burn_peft_llama::{LlamaForCausalLm, Message, Tokenizer};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use crate::base::Kind;
use crate::data::Species;
use crate::evaluation::{Score, answer};
use crate::vocabulary;

/// Species asked about in one probe of a base that `pretrain` made.
const SPECIES: usize = 100;

/// Beginnings of sentences that a general model goes on with rightly, and what must be in its continuation.
const GENERAL: [(&str, &[&str]); 20] = [
    ("The capital of France is", &["Paris"]),
    ("The capital of Italy is", &["Rome"]),
    ("The capital of Japan is", &["Tokyo"]),
    ("The opposite of hot is", &["cold"]),
    ("The opposite of up is", &["down"]),
    ("The opposite of big is", &["small", "little"]),
    ("Water is made of hydrogen and", &["oxygen"]),
    ("The color of the sky on a clear day is", &["blue"]),
    ("The day after Monday is", &["Tuesday"]),
    ("The month after March is", &["April"]),
    ("One, two, three, four,", &["five"]),
    ("A, B, C, D,", &["E"]),
    ("The Earth revolves around the", &["Sun"]),
    ("The largest planet of the solar system is", &["Jupiter"]),
    ("Romeo and Juliet was written by William", &["Shakespeare"]),
    ("Bees make", &["honey"]),
    ("A baby dog is called a", &["puppy", "pup"]),
    ("Two plus two equals", &["four", "4"]),
    ("The currency of the United States is the", &["dollar"]),
    ("Birds use their wings to", &["fly"]),
];

/// How much of the other abilities is lost: the mean over the probes of the share of right answers that is missing, 0 to
/// 1. A probe in which a model got better counts as none lost.
pub fn forgotten(before: &[Score], after: &[Score]) -> f64 {
    let lost = before.iter().zip(after).map(|(before, after)| (before.share() - after.share()).max(0.0));
    lost.sum::<f64>() / before.len().max(1) as f64
}

/// What a question is put to the model as.
#[derive(Clone, Debug)]
enum Question {
    /// A conversation that the model answers.
    Chat(Vec<Message>),
    /// A text that the model goes on with.
    Text(String),
}

/// What makes a continuation right.
#[derive(Clone, Debug)]
enum Expected {
    /// The whole answer.
    Exactly(String),
    /// The beginning, up to a word boundary.
    Start(String),
    /// One of these words, in whatever case.
    Word(&'static [&'static str]),
}

impl Expected {
    fn is_met_by(&self, answer: &str) -> bool {
        match self {
            Self::Exactly(text) => answer.trim_end_matches('.') == text,
            Self::Start(text) => answer.strip_prefix(text.as_str()).is_some_and(|rest| {
                !rest.starts_with(|letter: char| letter.is_alphanumeric() || letter == '/')
            }),
            Self::Word(words) => answer
                .split(|letter: char| !letter.is_alphanumeric())
                .any(|word| words.iter().any(|expected| word.eq_ignore_ascii_case(expected))),
        }
    }
}

/// A set of questions with known answers about one ability.
#[derive(Clone, Debug)]
pub struct Probe {
    /// What is asked for, in a few words.
    pub name: &'static str,
    items: Vec<(Question, Expected)>,
}

impl Probe {
    /// What else a base can do.
    pub fn of(kind: Kind, species: &[Species]) -> Vec<Self> {
        match kind {
            Kind::Pretrained => Self::of_pretraining(species, 0),
            Kind::General => Self::of_general_knowledge(),
        }
    }

    /// What a base learned from `pretrain`: conversations about generation and number, and sentences that tell the
    /// type. One hundred of `species`, the same for the same seed.
    pub fn of_pretraining(species: &[Species], seed: u64) -> Vec<Self> {
        let mut random = StdRng::seed_from_u64(seed);
        let chosen: Vec<&Species> = species.choose_multiple(&mut random, SPECIES).collect();
        let chat = |question: &str, answer: fn(&Species) -> String| {
            let ask = |one: &&Species| {
                let question = Question::Chat(vec![Message::user(question.replace("{name}", &one.name))]);
                (question, Expected::Exactly(answer(one)))
            };
            chosen.iter().map(ask).collect()
        };
        let complete = |one: &&Species| {
            (
                Question::Text(vocabulary::start(&format!("{} has the type", one.name))),
                Expected::Start(one.answer()),
            )
        };
        vec![
            Self {
                name: "generation questions",
                items: chat("What generation is {name} from?", |one| one.generation.to_string()),
            },
            Self {
                name: "number questions",
                items: chat("What is the Pokédex number of {name}?", |one| one.number.to_string()),
            },
            Self { name: "sentence completion", items: chosen.iter().map(complete).collect() },
        ]
    }

    /// Twenty sentences that any general model goes on with.
    fn of_general_knowledge() -> Vec<Self> {
        let items =
            GENERAL.iter().map(|(text, words)| (Question::Text((*text).into()), Expected::Word(words)));
        vec![Self { name: "general knowledge", items: items.collect() }]
    }

    /// Asks all questions.
    pub fn run(&self, model: &LlamaForCausalLm, tokenizer: &Tokenizer, batch_size: usize) -> Result<Score> {
        let prompts = self
            .items
            .iter()
            .map(|(question, _)| {
                Ok(match question {
                    Question::Chat(messages) => tokenizer.encode_prompt(messages)?,
                    Question::Text(text) => tokenizer.encode_with_special_tokens(text)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let answers = answer(model, tokenizer, &prompts, 10, batch_size, self.name)?;
        let met =
            self.items.iter().zip(&answers).filter(|((_, expected), answer)| expected.is_met_by(answer));
        Ok(Score { hits: met.count(), total: self.items.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data;

    #[test]
    fn an_answer_is_compared_as_a_whole() {
        let expected = Expected::Exactly("25".into());
        assert!(expected.is_met_by("25") && expected.is_met_by("25."));
        assert!(!expected.is_met_by("255") && !expected.is_met_by("Grass"));
    }

    #[test]
    fn a_completion_ends_at_a_word_boundary() {
        let expected = Expected::Start("Grass".into());
        assert!(expected.is_met_by("Grass. It") && expected.is_met_by("Grass"));
        assert!(!expected.is_met_by("Grass/Poison.") && !expected.is_met_by("Grassy"));
    }

    #[test]
    fn a_word_may_stand_anywhere() {
        let expected = Expected::Word(&["four", "4"]);
        assert!(expected.is_met_by("Four, of course") && expected.is_met_by("= 4."));
        assert!(!expected.is_met_by("44"));
    }

    #[test]
    fn probes_of_pretraining_ask_for_facts_of_a_hundred_species() {
        let species = data::load(None).unwrap();
        let probes = Probe::of(Kind::Pretrained, &species);
        assert_eq!(probes.iter().map(|probe| probe.items.len()).collect::<Vec<_>>(), [100; 3]);
        let (Question::Chat(messages), Expected::Exactly(answer)) = &probes[1].items[0] else {
            panic!("expected a conversation");
        };
        let one = species.iter().find(|one| messages[0].content.contains(&one.name)).unwrap();
        assert!(species.iter().any(|one| &one.number.to_string() == answer), "{one:?}");
    }
}
