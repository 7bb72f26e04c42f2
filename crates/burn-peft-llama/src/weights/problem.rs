//! What can be wrong with a tensor of a checkpoint.

/// One tensor of a checkpoint that does not fit the model.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WeightProblem {
    /// The model needs a tensor that the files do not have.
    Missing {
        /// Its name.
        name: String,
    },
    /// The files have a tensor that the model does not know.
    Unexpected {
        /// Its name.
        name: String,
        /// The most similar name that the model needs.
        nearest: Option<String>,
    },
    /// A tensor has another shape than the configuration says.
    Shape {
        /// Its name.
        name: String,
        /// The shape by the configuration.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor is not of type f32, f16 or bf16.
    Type {
        /// Its name.
        name: String,
        /// Its type.
        found: String,
    },
}

impl std::fmt::Display for WeightProblem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing { name } => write!(f, "`{name}` is missing"),
            Self::Unexpected { name, nearest: None } => write!(f, "`{name}` is unexpected"),
            Self::Unexpected { name, nearest: Some(nearest) } => {
                write!(f, "`{name}` is unexpected; the nearest name is `{nearest}`")
            }
            Self::Shape { name, expected, found } => {
                write!(f, "`{name}`: expected shape {expected:?}, found {found:?}")
            }
            Self::Type { name, found } => write!(f, "`{name}`: expected f32, f16 or bf16, found {found}"),
        }
    }
}
