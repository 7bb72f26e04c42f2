//! What the model is asked: system text, examples, question, and the form of the answer.

use burn_peft_llama::Message;

use crate::base::Kind;
use crate::data::{Species, list_of_types};

/// The conversation that asks for the types of one species.
#[derive(Clone, Debug)]
pub struct Prompt {
    system: String,
    shots: Vec<Species>,
}

impl Prompt {
    /// A prompt with this system text, or without a system message if there is none, and no examples.
    pub fn new(system: impl Into<String>) -> Self {
        Self { system: system.into(), shots: Vec::new() }
    }

    /// Puts answered examples before the question.
    pub fn with_shots(mut self, shots: &[Species]) -> Self {
        self.shots = shots.to_vec();
        self
    }

    /// The messages up to the question.
    pub fn question(&self, species: &Species) -> Vec<Message> {
        let mut messages = Vec::new();
        if !self.system.is_empty() {
            messages.push(Message::system(self.system.clone()));
        }
        for shot in &self.shots {
            messages.extend([Message::user(shot.name.clone()), Message::assistant(shot.answer())]);
        }
        messages.push(Message::user(species.name.clone()));
        messages
    }

    /// Question and answer: what is trained on.
    pub fn conversation(&self, species: &Species) -> Vec<Message> {
        let mut messages = self.question(species);
        messages.push(Message::assistant(species.answer()));
        messages
    }
}

/// The instruction. A general model is also told which types there are; one that `pretrain` made has read of no others,
/// and every token of the prompt costs time in training.
pub fn default_system(kind: Kind) -> String {
    let instruction = "You are a Pokémon expert. Answer with the type or types of the given Pokémon, separated by a slash, and nothing else.";
    match kind {
        Kind::Pretrained => instruction.into(),
        Kind::General => format!("{instruction} The types are: {}.", list_of_types()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data;

    #[test]
    fn the_question_is_the_bare_name_and_the_answer_has_its_form() {
        let species = data::load(None).unwrap();
        let messages = Prompt::new("system").conversation(&species[0]);
        assert_eq!(
            messages,
            [Message::system("system"), Message::user("Bulbasaur"), Message::assistant("Grass/Poison")]
        );
        assert_eq!(Prompt::new("").question(&species[0]), [Message::user("Bulbasaur")]);
    }

    #[test]
    fn examples_come_before_the_question() {
        let species = data::load(None).unwrap();
        let messages = Prompt::new("system").with_shots(&species[3..5]).question(&species[0]);
        let contents: Vec<_> = messages.iter().map(|message| message.content.as_str()).collect();
        assert_eq!(contents, ["system", "Charmander", "Fire", "Charmeleon", "Fire", "Bulbasaur"]);
    }

    #[test]
    fn general_models_are_told_the_types() {
        assert!(!default_system(Kind::Pretrained).contains("Fairy"));
        assert!(default_system(Kind::General).ends_with(
            "nothing else. The types are: Normal, Fire, Water, Electric, Grass, Ice, Fighting, Poison, Ground, Flying, Psychic, Bug, Rock, Ghost, Dragon, Dark, Steel, Fairy."
        ));
    }
}
