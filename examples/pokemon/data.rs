//! The species: one row of facts each, read from a CSV file, and the split by evolution family.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

/// The file that is part of the program: all 1025 species up to generation 9.
const EMBEDDED: &str = include_str!("data/species.csv");

/// The 18 types. The order is the one of the games' type chart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub enum Type {
    Normal,
    Fire,
    Water,
    Electric,
    Grass,
    Ice,
    Fighting,
    Poison,
    Ground,
    Flying,
    Psychic,
    Bug,
    Rock,
    Ghost,
    Dragon,
    Dark,
    Steel,
    Fairy,
}

impl Type {
    pub const ALL: [Self; 18] = [
        Self::Normal,
        Self::Fire,
        Self::Water,
        Self::Electric,
        Self::Grass,
        Self::Ice,
        Self::Fighting,
        Self::Poison,
        Self::Ground,
        Self::Flying,
        Self::Psychic,
        Self::Bug,
        Self::Rock,
        Self::Ghost,
        Self::Dragon,
        Self::Dark,
        Self::Steel,
        Self::Fairy,
    ];
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl FromStr for Type {
    type Err = ();

    /// The type of that name, in whatever case.
    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|kind| kind.to_string().eq_ignore_ascii_case(text)).ok_or(())
    }
}

impl TryFrom<String> for Type {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map_err(|()| format!("expected one of the types {}; found `{text}`", list_of_types()))
    }
}

/// One species.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Species {
    /// Number in the National Pokédex.
    pub number: u16,
    /// English name.
    pub name: String,
    /// First type.
    pub primary: Type,
    /// Second type, if there is one.
    pub secondary: Option<Type>,
    /// Generation of the games it appeared in first.
    pub generation: u8,
    /// Evolution family: species of one family share this text.
    pub family: String,
}

impl Species {
    /// One or two types, the first one first.
    pub fn types(&self) -> Vec<Type> {
        [Some(self.primary), self.secondary].into_iter().flatten().collect()
    }

    /// `Type` or `Type/Type`.
    pub fn answer(&self) -> String {
        self.types().iter().map(Type::to_string).collect::<Vec<_>>().join("/")
    }
}

/// Reads the species from `path`, or from the embedded file.
pub fn load(path: Option<&Path>) -> Result<Vec<Species>> {
    match path {
        None => parse(EMBEDDED).context("the embedded species file"),
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| {
                format!("`{}` cannot be read\nhint: `--data` takes a CSV file; {COLUMNS}", path.display())
            })?;
            parse(&text).map_err(|problems| anyhow!("`{}`: {problems}", path.display()))
        }
    }
}

/// The same, for a [`Split`]. Whether species can be split is no matter of the seed.
pub fn load_to_split(path: Option<&Path>) -> Result<Vec<Species>> {
    let species = load(path)?;
    Split::by_family(&species, 0).map_err(|problem| match path {
        Some(file) => anyhow!("`{}`: {problem}", file.display()),
        None => problem.into(),
    })?;
    Ok(species)
}

const COLUMNS: &str = "the columns are number,name,primary,secondary,generation,family";

/// All problems of the file are collected before it is refused.
fn parse(text: &str) -> Result<Vec<Species>> {
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(text.as_bytes());
    let mut species: Vec<Species> = Vec::new();
    let mut names = HashSet::new();
    let mut problems = Vec::new();
    let header = reader.headers()?;
    for column in ["number", "name", "primary", "generation", "family"] {
        if !header.iter().any(|found| found == column) {
            bail!("there is no column `{column}`\nhint: {COLUMNS}");
        }
    }
    for row in reader.deserialize::<Species>() {
        match row {
            Err(error) => problems.push(match error.kind() {
                csv::ErrorKind::Deserialize { pos: Some(pos), err } => format!("line {}: {err}", pos.line()),
                _ => error.to_string(),
            }),
            Ok(row) => {
                let at = species.len() + problems.len() + 2;
                if row.name.is_empty() || row.family.is_empty() {
                    problems.push(format!("line {at}: `name` and `family` must not be empty"));
                } else if !names.insert(row.name.clone()) {
                    problems.push(format!("line {at}: `{}` is there twice", row.name));
                } else if row.secondary == Some(row.primary) {
                    problems.push(format!("line {at}: `{}` has the type {} twice", row.name, row.primary));
                } else {
                    species.push(row);
                }
            }
        }
    }
    if !problems.is_empty() {
        let more = problems.len().saturating_sub(10);
        problems.truncate(10);
        if more > 0 {
            problems.push(format!("and {more} more"));
        }
        bail!("{}\nhint: {COLUMNS}", problems.join("\n"));
    }
    if species.is_empty() {
        bail!("there is no species in it\nhint: {COLUMNS}");
    }
    Ok(species)
}

/// `Normal, Fire, ..`, all 18.
pub fn list_of_types() -> String {
    Type::ALL.iter().map(Type::to_string).collect::<Vec<_>>().join(", ")
}

/// Why species cannot be split.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SplitError {
    /// With fewer than [`FAMILIES`] families, each may be larger than the part that is to be held out.
    #[error(
        "expected species of at least {FAMILIES} evolution families, so that one fifth can be held out; found {families}, the largest is `{largest}` with {size} of all {total} species\nhint: add species of other families; the column `family` has the same text for relatives and no others"
    )]
    TooFewFamilies { families: usize, largest: String, size: usize, total: usize },
}

/// Number of families that a split takes.
const FAMILIES: usize = 5;

/// Which species are trained on and which are held out. Neither part is empty.
#[derive(Clone, Debug, PartialEq)]
pub struct Split {
    pub train: Vec<Species>,
    pub test: Vec<Species>,
}

impl Split {
    /// Holds out one fifth of the species, whole evolution families at a time: relatives often share a type, so a
    /// relative in the training set would give the answer away. A family that is larger than this fifth is never held
    /// out, for it could leave nothing to train on; where such families dominate, less than one fifth is held out.
    /// Both parts are in the order the shuffle left.
    pub fn by_family(species: &[Species], seed: u64) -> Result<Self, SplitError> {
        let mut families: BTreeMap<&str, Vec<&Species>> = BTreeMap::new();
        for one in species {
            families.entry(&one.family).or_default().push(one);
        }
        if families.len() < FAMILIES {
            let (largest, size) = families
                .iter()
                .map(|(name, members)| (name.to_string(), members.len()))
                .max_by_key(|(_, size)| *size)
                .unwrap_or_default();
            let (families, total) = (families.len(), species.len());
            return Err(SplitError::TooFewFamilies { families, largest, size, total });
        }
        let mut families: Vec<_> = families.into_values().collect();
        families.shuffle(&mut StdRng::seed_from_u64(seed));
        let held_out = species.len() / FAMILIES;
        let (mut train, mut test) = (Vec::new(), Vec::new());
        for family in families {
            let part = if test.len() < held_out && family.len() <= held_out { &mut test } else { &mut train };
            part.extend(family.into_iter().cloned());
        }
        Ok(Self { train, test })
    }

    /// Sixteen hexadecimal digits that are others for other species, other facts about them, or another division: FNV-1a
    /// of the rows of both parts, each part in the order of its rows.
    pub fn fingerprint(&self) -> String {
        let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
        for (part, species) in [("train", &self.train), ("test", &self.test)] {
            let row = |one: &Species| {
                format!(
                    "{part}\t{}\t{}\t{}\t{}\t{}\n",
                    one.number,
                    one.name,
                    one.answer(),
                    one.generation,
                    one.family
                )
            };
            let mut rows: Vec<String> = species.iter().map(row).collect();
            rows.sort_unstable();
            for byte in rows.iter().flat_map(|row| row.bytes()) {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
        }
        format!("{hash:016x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "number,name,primary,secondary,generation,family\n";

    #[test]
    fn the_embedded_file_has_every_species() {
        let species = load(None).unwrap();
        assert_eq!(species.len(), 1025);
        assert!(species.iter().enumerate().all(|(index, one)| usize::from(one.number) == index + 1));
        assert_eq!(species[0].answer(), "Grass/Poison");
        assert_eq!(species[24].answer(), "Electric");
        assert!(species.iter().all(|one| (1..=9).contains(&one.generation)));
    }

    #[test]
    fn no_family_is_on_both_sides() {
        let species = load(None).unwrap();
        let split = Split::by_family(&species, 7).unwrap();
        assert_eq!(split.train.len() + split.test.len(), species.len());
        assert!((205..215).contains(&split.test.len()), "{}", split.test.len());
        let trained: HashSet<_> = split.train.iter().map(|one| &one.family).collect();
        assert!(split.test.iter().all(|one| !trained.contains(&one.family)));
    }

    #[test]
    fn the_seed_decides_the_split() {
        let species = load(None).unwrap();
        let split = |seed| Split::by_family(&species, seed).unwrap();
        assert_eq!(split(1), split(1));
        assert_ne!(split(1), split(2));
    }

    #[test]
    fn a_fingerprint_is_the_same_for_the_same_division_only() {
        let species = load(None).unwrap();
        let of = |species: &[Species], seed| Split::by_family(species, seed).unwrap().fingerprint();
        assert_eq!(of(&species, 0), "e561b6952a4a1c54", "adapters that were saved before are not recognised");
        let mut split = Split::by_family(&species, 0).unwrap();
        split.train.reverse();
        assert_eq!(split.fingerprint(), of(&species, 0));
        std::mem::swap(&mut split.train, &mut split.test);
        let mut retyped = species.clone();
        retyped[3].secondary = Some(Type::Water);
        let others = [split.fingerprint(), of(&species, 1), of(&species[1..], 0), of(&retyped, 0)];
        assert!(others.iter().all(|other| *other != of(&species, 0)), "{others:?}");
    }

    /// Species of families of these sizes.
    fn families(sizes: &[usize]) -> Vec<Species> {
        let of_family = |(family, size): (usize, &usize)| {
            let member = move |index: usize| Species {
                number: 1,
                name: format!("{family}-{index}"),
                primary: Type::Fire,
                secondary: None,
                generation: 1,
                family: format!("F{family}"),
            };
            (0..*size).map(member).collect::<Vec<_>>()
        };
        sizes.iter().enumerate().flat_map(of_family).collect()
    }

    #[test]
    fn both_sides_have_species_whatever_family_dominates() {
        for sizes in [&[96, 1, 1, 1, 1][..], &[40, 40, 10, 5, 5], &[20; 5], &[1; 5], &[9, 9, 9, 9, 8, 1]] {
            let (species, mut at_most) = (families(sizes), 0);
            for seed in 0..50 {
                let split = Split::by_family(&species, seed).unwrap();
                assert_eq!(split.train.len() + split.test.len(), species.len());
                assert!(!split.test.is_empty(), "{sizes:?}, seed {seed}");
                at_most = at_most.max(split.test.len());
            }
            assert!(at_most < 2 * (species.len() / FAMILIES), "{sizes:?}: {at_most}");
        }
    }

    #[test]
    fn too_few_families_are_refused_with_the_largest() {
        let error = Split::by_family(&families(&[9]), 0).unwrap_err();
        let expected = SplitError::TooFewFamilies { families: 1, largest: "F0".into(), size: 9, total: 9 };
        assert_eq!(error, expected);
        let text = Split::by_family(&families(&[2, 7, 3, 1]), 0).unwrap_err().to_string();
        for expected in ["found 4", "`F1` with 7 of all 13", "hint:"] {
            assert!(text.contains(expected), "{expected} in {text}");
        }
        assert!(Split::by_family(&[], 0).is_err());
    }

    #[test]
    fn problems_are_listed_with_their_line() {
        let rows = "1,A,Fire,,1,A\n2,A,Fire,,1,A\n3,C,Fire,Fire,1,C\n4,D,Fyre,,1,D\n";
        let text = parse(&format!("{HEADER}{rows}")).unwrap_err().to_string();
        for expected in [
            "line 3: `A` is there twice",
            "line 4: `C` has the type Fire twice",
            "line 5: ",
            "found `Fyre`",
            "hint: the columns",
        ] {
            assert!(text.contains(expected), "{expected} in {text}");
        }
        assert!(parse(HEADER).unwrap_err().to_string().contains("no species"));
        let text = parse("name\nA\n").unwrap_err().to_string();
        assert!(text.starts_with("there is no column `number`"), "{text}");
    }

    #[test]
    fn types_are_read_in_any_case() {
        let species = parse(&format!("{HEADER}6,Charizard,fire,FLYING,1,Charmander\n")).unwrap();
        assert_eq!(species[0].answer(), "Fire/Flying");
        assert_eq!("gRASS".parse(), Ok(Type::Grass));
        assert!("Gras".parse::<Type>().is_err());
    }
}
