//! What Python sees of `schedule.rs`: the order of turns and the sources (Algorithm 1, lines 1–2, 8–9).

use pyo3::prelude::*;
use pyo3::types::{PyMapping, PyString};

use crate::error::Error;
use crate::schedule::{self, Sources};

/// Find the modality trained just before: line 9 of Algorithm 1, counted from zero.
///
/// Parameters
/// ----------
/// active : int
///     Index of the modality in training, 0 to modalities - 1.
/// modalities : int
///     Number of modalities, at least 1.
///
/// Returns
/// -------
/// int
///     (active + modalities - 1) mod modalities; with one modality that is the modality itself.
///
/// Raises
/// ------
/// ValueError
///     If an argument is out of its range.
///
/// References
/// ----------
/// Algorithm 1, line 9: k = mod(j + m - 2, m) + 1, counted from one.
#[pyfunction]
#[pyo3(signature = (active, modalities))]
pub fn previous_modality(active: i64, modalities: i64) -> PyResult<i64> {
    Ok(schedule::previous_modality(active, modalities)?)
}

/// Find round and modality of a turn: lines 1 and 2 of Algorithm 1, counted from zero.
///
/// Parameters
/// ----------
/// index : int
///     Number of turns before this one, at least 0.
/// modalities : int
///     Number of modalities, at least 1.
///
/// Returns
/// -------
/// round : int
///     index // modalities.
/// active : int
///     index mod modalities.
///
/// Raises
/// ------
/// ValueError
///     If an argument is out of its range.
///
/// References
/// ----------
/// Algorithm 1, lines 1 and 2.
#[pyfunction]
#[pyo3(signature = (index, modalities))]
pub fn turn_at(index: i64, modalities: i64) -> PyResult<(i64, i64)> {
    Ok(schedule::turn_at(index, modalities)?)
}

/// From the word or mapping that Python passes.
fn parse_sources(sources: &Bound<'_, PyAny>) -> PyResult<Sources> {
    let wrong = |what: String| {
        Error::value(
            "sources",
            what,
            "\"previous\", \"others\", \"earlier\", or a mapping from each modality to None, a name, or a list of names",
        )
    };
    if let Ok(word) = sources.downcast::<PyString>() {
        return match word.to_cow()?.as_ref() {
            "previous" => Ok(Sources::Previous),
            "others" => Ok(Sources::Others),
            "earlier" => Ok(Sources::Earlier),
            other => Err(wrong(format!("{other:?}")).into()),
        };
    }
    let Ok(mapping) = sources.downcast::<PyMapping>() else {
        return Err(wrong(sources.get_type().fully_qualified_name()?.to_string()).into());
    };
    let mut map = Vec::new();
    for item in mapping.items()?.iter() {
        let (name, value): (String, Bound<'_, PyAny>) = item.extract()?;
        let list = if value.is_none() {
            Vec::new()
        } else if let Ok(word) = value.downcast::<PyString>() {
            vec![word.to_string()]
        } else {
            value
                .extract()
                .map_err(|_| wrong(format!("{value:?} for {name:?}")))?
        };
        map.push((name, list));
    }
    Ok(Sources::Map(map))
}

/// List for each modality those whose projectors its gradients meet, in the order in which they act.
///
/// Parameters
/// ----------
/// names : list of str
///     The modalities in the order of training, all different.
/// sources : {"previous", "others", "earlier"} or mapping
///     "previous": the one trained just before. "others": all others in the order of training, the previous one last. "earlier": those
///     before it. A mapping has an
///     entry for every modality: None or an empty list (not projected), a name, or a list of names. With one modality both words give
///     the modality itself.
///
/// Returns
/// -------
/// list of list of int
///     For each modality the indices of its sources in `names`.
///
/// Raises
/// ------
/// ValueError
///     If a name is unknown, missing or there twice, or `sources` is something else.
///
/// References
/// ----------
/// Algorithm 1, lines 8 and 9.
#[pyfunction]
#[pyo3(signature = (names, sources))]
pub fn source_lists(names: Vec<String>, sources: &Bound<'_, PyAny>) -> PyResult<Vec<Vec<usize>>> {
    Ok(schedule::source_lists(&names, &parse_sources(sources)?)?)
}
