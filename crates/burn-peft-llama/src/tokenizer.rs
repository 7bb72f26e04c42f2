//! The tokenizer of a model directory: text to token ids and back.

use std::{collections::HashSet, path::Path, sync::Arc};

use serde::Deserialize;
use serde_json::json;
use tokenizers::{
    AddedToken,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainerBuilder},
    },
    pre_tokenizers::byte_level::ByteLevel,
    processors::template::TemplateProcessing,
};

use crate::{
    ChatTemplate, LlamaError,
    chat_template::{TEMPLATE_FILE, TemplateField},
    file,
};

const TOKENIZER_FILE: &str = "tokenizer.json";
const CONFIG_FILE: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_FILE: &str = "special_tokens_map.json";

/// A tokenizer with its special tokens and chat template.
///
/// Cloning is cheap. Conversations are encoded by [`encode_prompt`](Self::encode_prompt) and
/// [`encode_conversation`](Self::encode_conversation).
///
/// ```
/// use burn_peft_llama::{SpecialTokens, Tokenizer};
///
/// # fn main() -> Result<(), burn_peft_llama::LlamaError> {
/// let texts = ["low lower lowest", "new newer newest"];
/// let tokenizer = Tokenizer::train_bpe(texts, 270, SpecialTokens::new("<s>", "</s>"), None)?;
/// let ids = tokenizer.encode("lowest")?;
/// assert_eq!(tokenizer.decode(&ids, true)?, "lowest");
/// assert!(ids.len() < "lowest".len());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    special: SpecialTokens,
    bos_id: Option<u32>,
    eos_id: Option<u32>,
    pad_id: Option<u32>,
    special_ids: Arc<HashSet<u32>>,
    chat_template: Option<ChatTemplate>,
}

/// The special tokens of a tokenizer, by their text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begins a text. Default: none.
    pub bos_token: Option<String>,
    /// Ends a text or an answer. Default: none.
    pub eos_token: Option<String>,
    /// Fills up shorter sequences of a batch. Default: none.
    pub pad_token: Option<String>,
    /// Further tokens that are never split, such as those that separate messages. Default: none.
    pub additional: Vec<String>,
}

impl SpecialTokens {
    /// A token for the beginning and one for the end.
    pub fn new(bos_token: impl Into<String>, eos_token: impl Into<String>) -> Self {
        Self { bos_token: Some(bos_token.into()), eos_token: Some(eos_token.into()), ..Self::default() }
    }

    /// Sets the padding token.
    pub fn with_pad_token(mut self, pad_token: impl Into<String>) -> Self {
        self.pad_token = Some(pad_token.into());
        self
    }

    /// Adds further special tokens.
    pub fn with_additional<T: Into<String>>(mut self, tokens: impl IntoIterator<Item = T>) -> Self {
        self.additional.extend(tokens.into_iter().map(Into::into));
        self
    }

    /// All of them, each once, in the order of the fields.
    fn all(&self) -> Vec<&str> {
        let mut all: Vec<&str> = Vec::new();
        let named = [&self.bos_token, &self.eos_token, &self.pad_token].into_iter().flatten();
        for token in named.chain(&self.additional) {
            if !token.is_empty() && !all.contains(&token.as_str()) {
                all.push(token);
            }
        }
        all
    }
}

/// A special token in a configuration file: its text, or an object that holds it.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokenField {
    Text(String),
    Object { content: String },
}

impl TokenField {
    fn into_text(self) -> String {
        match self {
            Self::Text(text) | Self::Object { content: text } => text,
        }
    }
}

/// The part of `tokenizer_config.json` and `special_tokens_map.json` that is read.
#[derive(Default, Deserialize)]
struct ConfigFile {
    bos_token: Option<TokenField>,
    eos_token: Option<TokenField>,
    pad_token: Option<TokenField>,
    chat_template: Option<TemplateField>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model directory and, where they exist, `tokenizer_config.json`,
    /// `special_tokens_map.json` (for special tokens the former does not name) and the chat template.
    ///
    /// Truncation and padding that were saved inside `tokenizer.json` are switched off.
    ///
    /// # Errors
    ///
    /// - [`LlamaError::ReadText`] if `tokenizer.json` is missing or a file cannot be read,
    /// - [`LlamaError::Tokenizer`] if `tokenizer.json` is refused, [`LlamaError::TokenizerJson`] for the others,
    /// - [`LlamaError::UnknownSpecialToken`] if a special token is not in the vocabulary,
    /// - [`LlamaError::ChatTemplate`] if the chat template is malformed.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self, LlamaError> {
        let dir = dir.as_ref();
        let path = dir.join(TOKENIZER_FILE);
        let hint = "expected a model directory with a `tokenizer.json`; for models that only have a \
                    `tokenizer.model`, save the fast tokenizer with transformers first";
        let text = file::read(&path, hint)?;
        let inner = tokenizers::Tokenizer::from_bytes(text.as_bytes()).map_err(|source| {
            LlamaError::Tokenizer { action: format!("load `{}`", path.display()), source }
        })?;

        let config: ConfigFile =
            file::read_json_or_default(&dir.join(CONFIG_FILE), "it names the special tokens")?;
        let map: ConfigFile =
            file::read_json_or_default(&dir.join(SPECIAL_TOKENS_FILE), "it names the special tokens")?;
        let text = |a: Option<TokenField>, b: Option<TokenField>| a.or(b).map(TokenField::into_text);
        let special = SpecialTokens {
            bos_token: text(config.bos_token, map.bos_token),
            eos_token: text(config.eos_token, map.eos_token),
            pad_token: text(config.pad_token, map.pad_token),
            additional: Vec::new(),
        };
        let (bos, eos) = (special.bos_token.as_deref(), special.eos_token.as_deref());
        let chat_template = ChatTemplate::load(dir, config.chat_template, bos, eos)?;
        Self::from_parts(inner, special, chat_template)
    }

    /// Puts a tokenizer together from a `tokenizers` one, its special tokens and a chat template.
    ///
    /// # Errors
    ///
    /// [`LlamaError::UnknownSpecialToken`] if a special token is not in the vocabulary.
    pub fn from_parts(
        mut inner: tokenizers::Tokenizer,
        special: SpecialTokens,
        chat_template: Option<ChatTemplate>,
    ) -> Result<Self, LlamaError> {
        // Saved truncation would silently cut training examples and move their labels.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|source| LlamaError::Tokenizer { action: "switch truncation off".to_owned(), source })?;

        let id = |field: &'static str, token: &Option<String>| match token {
            None => Ok(None),
            Some(token) => match inner.token_to_id(token) {
                Some(id) => Ok(Some(id)),
                None => Err(LlamaError::UnknownSpecialToken { field, token: token.clone() }),
            },
        };
        let bos_id = id("bos_token", &special.bos_token)?;
        let eos_id = id("eos_token", &special.eos_token)?;
        let pad_id = id("pad_token", &special.pad_token)?;
        let added = inner.get_added_tokens_decoder();
        let special_ids = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id);
        let special_ids = special_ids.chain(eos_id).collect();
        Ok(Self {
            inner: Arc::new(inner),
            special,
            bos_id,
            eos_id,
            pad_id,
            special_ids: Arc::new(special_ids),
            chat_template,
        })
    }

    /// Trains a byte-level BPE tokenizer.
    ///
    /// The vocabulary holds the special tokens first, in the order of [`SpecialTokens`]' fields, then the 256
    /// bytes, then merges, `vocab_size` in all or fewer if `texts` has no more pairs to merge. Special tokens inside
    /// `texts` are left out of the training. If there is a `bos_token`, it begins every text that is encoded with
    /// special tokens. `chat_template` is the source of a Jinja template.
    ///
    /// # Errors
    ///
    /// - [`LlamaError::TrainingOption`] if `vocab_size` does not hold the special tokens and bytes,
    /// - [`LlamaError::ChatTemplate`] if the template is malformed,
    /// - [`LlamaError::Tokenizer`] if the trainer fails.
    pub fn train_bpe<I>(
        texts: I,
        vocab_size: usize,
        special: SpecialTokens,
        chat_template: Option<&str>,
    ) -> Result<Self, LlamaError>
    where
        I: IntoIterator<Item: AsRef<str>, IntoIter: Send>,
    {
        let failed = |source| LlamaError::Tokenizer { action: "train".to_owned(), source };
        let tokens: Vec<String> = special.all().into_iter().map(str::to_owned).collect();
        if vocab_size < tokens.len() + 256 {
            return Err(LlamaError::TrainingOption {
                option: "vocab_size",
                expected: "room for 256 bytes and the special tokens",
                found: vocab_size.to_string(),
            });
        }

        let mut inner = tokenizers::Tokenizer::new(BPE::default());
        inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        inner.with_decoder(Some(ByteLevel::default()));
        let trainer = BpeTrainerBuilder::new()
            .vocab_size(vocab_size)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(tokens.iter().map(|token| AddedToken::from(token.as_str(), true)).collect())
            .build();
        let separators = tokens.clone();
        let pieces = texts.into_iter().flat_map(move |text| split_out(text.as_ref(), &separators));
        inner.train(&mut TrainerWrapper::from(trainer), pieces).map_err(failed)?;
        if let Some((bos, id)) =
            special.bos_token.as_ref().and_then(|bos| Some((bos, inner.token_to_id(bos)?)))
        {
            let processor = TemplateProcessing::builder()
                .try_single(vec![bos.as_str(), "$A"])
                .map_err(|error| failed(error.into()))?
                .special_tokens(vec![(bos.clone(), id)])
                .build()
                .map_err(|error| failed(error.into()))?;
            inner.with_post_processor(Some(processor));
        }

        let (bos, eos) = (special.bos_token.as_deref(), special.eos_token.as_deref());
        let chat_template = chat_template.map(|source| ChatTemplate::new(source, bos, eos)).transpose()?;
        Self::from_parts(inner, special, chat_template)
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and, if there is a chat template, `chat_template.jinja`
    /// into an existing directory, as transformers 5 reads them.
    ///
    /// # Errors
    ///
    /// [`LlamaError::WriteText`] if a file cannot be written.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<(), LlamaError> {
        let dir = dir.as_ref();
        let tokenizer = self.inner.to_string(true).map_err(|source| LlamaError::Tokenizer {
            action: "write `tokenizer.json`".to_owned(),
            source,
        })?;
        let mut config = json!({ "clean_up_tokenization_spaces": false });
        let named = [
            ("bos_token", &self.special.bos_token),
            ("eos_token", &self.special.eos_token),
            ("pad_token", &self.special.pad_token),
        ];
        for (field, token) in named {
            if let Some(token) = token {
                config[field] = json!(token);
            }
        }
        config["tokenizer_class"] = json!("PreTrainedTokenizerFast");

        file::write(&dir.join(TOKENIZER_FILE), &tokenizer)?;
        file::write(&dir.join(CONFIG_FILE), &format!("{config:#}\n"))?;
        if let Some(template) = &self.chat_template {
            file::write(&dir.join(TEMPLATE_FILE), template.source())?;
        }
        Ok(())
    }

    /// Replaces the chat template.
    pub fn with_chat_template(mut self, chat_template: ChatTemplate) -> Self {
        self.chat_template = Some(chat_template);
        self
    }

    /// Fixes the date that the chat template sees, see [`ChatTemplate::with_date`]. Without a template, nothing
    /// changes.
    ///
    /// # Errors
    ///
    /// [`LlamaError::InvalidDate`] if `date` is not one.
    pub fn with_date(mut self, date: &str) -> Result<Self, LlamaError> {
        self.chat_template = self.chat_template.map(|template| template.with_date(date)).transpose()?;
        Ok(self)
    }

    /// Token ids of `text`. Special tokens written out in `text` are recognised; none is added.
    ///
    /// # Errors
    ///
    /// [`LlamaError::Tokenizer`] if the tokenizer cannot express the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, LlamaError> {
        Ok(self.encoding(text, false)?.get_ids().to_vec())
    }

    /// Token ids of `text` with the special tokens around it that the model expects of a text, such as one for its
    /// beginning. Not for rendered chats: they hold theirs already.
    ///
    /// # Errors
    ///
    /// As [`encode`](Self::encode).
    pub fn encode_with_special_tokens(&self, text: &str) -> Result<Vec<u32>, LlamaError> {
        Ok(self.encoding(text, true)?.get_ids().to_vec())
    }

    /// Text of token ids, without the special ones if `skip_special_tokens`.
    ///
    /// # Errors
    ///
    /// [`LlamaError::Tokenizer`] if the tokenizer's decoder fails. Unknown ids are left out, as transformers does.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, LlamaError> {
        self.inner
            .decode(ids, skip_special_tokens)
            .map_err(|source| LlamaError::Tokenizer { action: format!("decode {} ids", ids.len()), source })
    }

    /// The chat template, if the model has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// The special tokens by their text; `additional` is empty for a loaded tokenizer.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// Id of the token that begins a text.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// Id of the token that ends a text or an answer.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos_id
    }

    /// Id to pad with: the padding token, or the end token where the model has none.
    pub fn pad_token_id(&self) -> Option<u32> {
        self.pad_id.or(self.eos_id)
    }

    /// Id of the token with exactly this text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Text of a token as the vocabulary has it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Number of tokens, added ones included. A model's `vocab_size` may be larger.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether a token is marked as special, or is the end token.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    pub(crate) fn encoding(&self, text: &str, add_special: bool) -> Result<tokenizers::Encoding, LlamaError> {
        self.inner.encode(text, add_special).map_err(|source| LlamaError::Tokenizer {
            action: format!("encode {} bytes", text.len()),
            source,
        })
    }
}

/// The parts of `text` between special tokens.
fn split_out(text: &str, special: &[String]) -> Vec<String> {
    let mut parts = vec![text.to_owned()];
    for token in special {
        parts = parts.iter().flat_map(|part| part.split(token.as_str())).map(str::to_owned).collect();
    }
    parts.retain(|part| !part.is_empty());
    parts
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::chat_template::tests::{CHATML, LLAMA3};

    const TEXTS: [&str; 4] = [
        "Bulbasaur is of type grass and poison.",
        "Charmander is of type fire.",
        "Squirtle is of type water.",
        "<|im_start|>user\nSquirtle<|im_end|>\n",
    ];

    /// A ChatML tokenizer whose end token is its padding token.
    pub(crate) fn chatml() -> Tokenizer {
        let special = SpecialTokens { bos_token: None, ..SpecialTokens::new("", "<|im_end|>") };
        let special = special.with_pad_token("<|im_end|>").with_additional(["<|im_start|>"]);
        Tokenizer::train_bpe(TEXTS, 300, special, Some(CHATML)).unwrap()
    }

    /// A tokenizer in the manner of Llama 3: a beginning of its own, headers, padding apart.
    pub(crate) fn llama3() -> Tokenizer {
        let special = SpecialTokens::new("<|begin_of_text|>", "<|eot_id|>")
            .with_pad_token("<|pad|>")
            .with_additional(["<|start_header_id|>", "<|end_header_id|>"]);
        let tokenizer = Tokenizer::train_bpe(TEXTS, 300, special, Some(LLAMA3)).unwrap();
        tokenizer.with_date("2024-07-26").unwrap()
    }

    #[test]
    fn training_fills_the_vocabulary_in_order_and_is_repeatable() {
        let tokenizer = chatml();
        assert_eq!(tokenizer.vocab_size(), 300);
        assert_eq!(tokenizer.token_to_id("<|im_end|>"), Some(0));
        assert_eq!(tokenizer.token_to_id("<|im_start|>"), Some(1));
        assert_eq!((tokenizer.eos_token_id(), tokenizer.pad_token_id()), (Some(0), Some(0)));
        let ids = tokenizer.encode(TEXTS[0]).unwrap();
        assert!(ids.len() < TEXTS[0].len() / 2, "{ids:?}");
        assert_eq!(ids, chatml().encode(TEXTS[0]).unwrap());
        // No merge was learnt inside the special tokens of the training text.
        assert!(tokenizer.token_to_id("im").is_none() && tokenizer.token_to_id("start").is_none());
    }

    #[test]
    fn any_text_round_trips_and_special_tokens_stay_whole() {
        let tokenizer = chatml();
        let text = "é 日本 🦀\t\u{0}";
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        let ids = tokenizer.encode("<|im_start|>a<|im_end|>").unwrap();
        assert_eq!((ids[0], ids.len(), ids[2]), (1, 3, 0));
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "<|im_start|>a<|im_end|>");
    }

    #[test]
    fn the_beginning_is_added_only_when_asked_for() {
        let tokenizer = llama3();
        let plain = tokenizer.encode("fire").unwrap();
        assert_ne!(plain[0], 0);
        let with = tokenizer.encode_with_special_tokens("fire").unwrap();
        assert_eq!((with[0], &with[1..]), (0, plain.as_slice()));
        assert_eq!(tokenizer.bos_token_id(), Some(0));
        assert_eq!(tokenizer.pad_token_id(), tokenizer.token_to_id("<|pad|>"));
        assert_eq!(chatml().encode_with_special_tokens("fire").unwrap(), chatml().encode("fire").unwrap());
    }

    #[test]
    fn a_saved_directory_loads_equal() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = llama3();
        tokenizer.save(dir.path()).unwrap();
        let loaded = Tokenizer::load(dir.path()).unwrap().with_date("2024-07-26").unwrap();
        assert_eq!(
            loaded.encode_with_special_tokens(TEXTS[1]).unwrap(),
            tokenizer.encode_with_special_tokens(TEXTS[1]).unwrap()
        );
        assert_eq!(loaded.special.eos_token.as_deref(), Some("<|eot_id|>"));
        assert_eq!(
            (loaded.bos_id, loaded.eos_id, loaded.pad_id),
            (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        );
        assert_eq!(loaded.chat_template(), tokenizer.chat_template());
    }

    #[test]
    fn tokens_are_read_as_text_or_object_and_the_map_fills_in() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| file::write(&dir.path().join(name), text).unwrap();
        llama3().save(dir.path()).unwrap();
        write(
            CONFIG_FILE,
            r#"{"bos_token": {"content": "<|begin_of_text|>", "lstrip": false}, "pad_token": null}"#,
        );
        write(SPECIAL_TOKENS_FILE, r#"{"eos_token": {"content": "<|eot_id|>"}, "bos_token": "<|pad|>"}"#);
        let loaded = Tokenizer::load(dir.path()).unwrap();
        assert_eq!(loaded.special.bos_token.as_deref(), Some("<|begin_of_text|>"));
        assert_eq!(loaded.special.eos_token.as_deref(), Some("<|eot_id|>"));
        assert_eq!((loaded.pad_id, loaded.pad_token_id()), (None, loaded.eos_id));
    }

    #[test]
    fn saved_truncation_and_padding_are_switched_off() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = chatml();
        let mut inner = (*tokenizer.inner).clone();
        inner
            .with_truncation(Some(tokenizers::TruncationParams { max_length: 2, ..Default::default() }))
            .unwrap();
        let strategy = tokenizers::PaddingStrategy::Fixed(64);
        inner.with_padding(Some(tokenizers::PaddingParams { strategy, ..Default::default() }));
        assert_eq!(inner.encode(TEXTS[0], false).unwrap().len(), 64);
        file::write(&dir.path().join(TOKENIZER_FILE), &inner.to_string(false).unwrap()).unwrap();
        let loaded = Tokenizer::load(dir.path()).unwrap();
        assert_eq!(loaded.encode(TEXTS[0]).unwrap(), tokenizer.encode(TEXTS[0]).unwrap());
    }

    #[test]
    fn bad_directories_give_errors_that_name_the_file_or_token() {
        let dir = tempfile::tempdir().unwrap();
        let error = Tokenizer::load(dir.path()).unwrap_err();
        assert!(matches!(error, LlamaError::ReadText { .. }) && error.to_string().contains("tokenizer.json"));
        file::write(&dir.path().join(TOKENIZER_FILE), "{}").unwrap();
        assert!(matches!(Tokenizer::load(dir.path()), Err(LlamaError::Tokenizer { .. })));
        chatml().save(dir.path()).unwrap();
        file::write(&dir.path().join(CONFIG_FILE), r#"{"eos_token": "<nope>"}"#).unwrap();
        assert!(matches!(
            Tokenizer::load(dir.path()),
            Err(LlamaError::UnknownSpecialToken { field: "eos_token", token }) if token == "<nope>"
        ));
        file::write(&dir.path().join(CONFIG_FILE), "[").unwrap();
        assert!(matches!(Tokenizer::load(dir.path()), Err(LlamaError::TokenizerJson { .. })));
        let small = Tokenizer::train_bpe(TEXTS, 257, SpecialTokens::new("<s>", "</s>"), None);
        assert!(matches!(small, Err(LlamaError::TrainingOption { option: "vocab_size", .. })));
    }
}
