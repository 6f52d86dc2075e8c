//! Whose turn it is and whose projector is used: Algorithm 1, lines 1–2 and 8–9.

use crate::error::{Error, Result};

/// What the user says about sources.
#[derive(Clone, Debug)]
pub enum Sources {
    /// The modality trained just before: line 9.
    Previous,
    /// All others, in the order of training, the previous one last.
    Others,
    /// Those before it in the order of training; the first has none.
    Earlier,
    /// For each modality the names of its sources; none: not projected.
    Map(Vec<(String, Vec<String>)>),
}

/// m ≥ 1, and 0 ≤ j < m.
fn check(argument: &str, index: i64, modalities: i64) -> Result<()> {
    if modalities < 1 {
        return Err(Error::value("modalities", modalities, "a number ≥ 1"));
    }
    if !(0..modalities).contains(&index) {
        return Err(Error::value(
            argument,
            index,
            format_args!("a number from 0 to {}", modalities - 1),
        ));
    }
    Ok(())
}

/// Line 9, `k = mod(j+m−2, m)+1`, counted from zero: `k = mod(j+m−1, m)`.
pub fn previous_modality(active: i64, modalities: i64) -> Result<i64> {
    check("active", active, modalities)?;
    Ok((active + modalities - 1) % modalities)
}

/// Lines 1–2: the turn number `index` is the one of modality j = mod(index, m) in round ⌊index/m⌋, all counted from zero.
pub fn turn_at(index: i64, modalities: i64) -> Result<(i64, i64)> {
    check("active", 0, modalities)?;
    if index < 0 {
        return Err(Error::value("index", index, "a number ≥ 0"));
    }
    Ok((index / modalities, index % modalities))
}

/// For each modality the indices of its sources, in the order in which their projectors are applied.
pub fn source_lists(names: &[String], sources: &Sources) -> Result<Vec<Vec<usize>>> {
    let m = names.len();
    for (index, name) in names.iter().enumerate() {
        if names[..index].contains(name) {
            return Err(Error::value(
                format_args!("names[{index}]"),
                format_args!("{name:?} again"),
                "names that differ",
            ));
        }
    }
    let map = match sources {
        Sources::Previous => return Ok((0..m).map(|j| vec![(j + m - 1) % m]).collect()),
        Sources::Others if m == 1 => return Ok(vec![vec![0]]),
        Sources::Others => {
            return Ok((0..m)
                .map(|j| (1..m).map(|step| (j + step) % m).collect())
                .collect())
        }
        Sources::Earlier => return Ok((0..m).map(|j| (0..j).collect()).collect()),
        Sources::Map(map) => map,
    };
    let index_of = |argument: &str, name: &String| {
        names
            .iter()
            .position(|known| known == name)
            .ok_or_else(|| Error::value(argument, format_args!("{name:?}"), one_of(names)))
    };
    for (name, _) in map {
        index_of("sources", name)?;
    }
    names
        .iter()
        .map(|name| {
            let (_, wanted) = map.iter().find(|(key, _)| key == name).ok_or_else(|| {
                let given: Vec<String> = map.iter().map(|(key, _)| key.clone()).collect();
                Error::value(
                    "sources",
                    format_args!("keys {given:?}"),
                    format_args!("an entry for every modality; {name:?} has none"),
                )
            })?;
            wanted
                .iter()
                .map(|source| index_of(&format!("sources[{name:?}]"), source))
                .collect()
        })
        .collect()
}

/// The known names, for an error text.
fn one_of(names: &[String]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
    format!("one of {}", quoted.join(", "))
}
