//! What can go wrong, and which Python exception each case becomes.

use pyo3::exceptions::{PyArithmeticError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::PyErr;
use tch::TchError;
use thiserror::Error;

/// Every failure of this crate; the variants carry the argument, what came, and what was expected.
#[derive(Debug, Error)]
pub enum Error {
    /// A shape, dtype, device or number that is not allowed.
    #[error("{argument}: got {value}, expected {expected}")]
    Value {
        /// Name of the argument, with an index where it is a list.
        argument: String,
        /// What came.
        value: String,
        /// What would have been right.
        expected: String,
    },
    /// Something that is not a tensor where a tensor belongs.
    #[error("got {value}{place}, expected {expected}")]
    Type {
        /// Empty, or " at index …" where the argument is a list; pyo3 puts the argument's name in front.
        place: String,
        /// The type that came.
        value: String,
        /// The type that would have been right.
        expected: String,
    },
    /// Infinite or undefined numbers where the result would be meaningless.
    #[error("{argument}: got {value}, expected {expected}")]
    Arithmetic {
        /// Name of the argument.
        argument: String,
        /// What came.
        value: String,
        /// What would have been right.
        expected: String,
    },
    /// Torch refused; the first line of its own words.
    #[error("torch: {0}")]
    Torch(String),
}

/// Result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// [`Error::Value`] from anything that can be printed.
    pub fn value(argument: impl ToString, value: impl ToString, expected: impl ToString) -> Self {
        Self::Value {
            argument: argument.to_string(),
            value: value.to_string(),
            expected: expected.to_string(),
        }
    }

    /// [`Error::Type`] from anything that can be printed.
    pub fn type_(place: impl ToString, value: impl ToString, expected: impl ToString) -> Self {
        Self::Type {
            place: place.to_string(),
            value: value.to_string(),
            expected: expected.to_string(),
        }
    }

    /// [`Error::Arithmetic`] from anything that can be printed.
    pub fn arithmetic(
        argument: impl ToString,
        value: impl ToString,
        expected: impl ToString,
    ) -> Self {
        Self::Arithmetic {
            argument: argument.to_string(),
            value: value.to_string(),
            expected: expected.to_string(),
        }
    }
}

impl From<TchError> for Error {
    fn from(error: TchError) -> Self {
        let text = match error {
            TchError::Torch(text) => text,
            other => other.to_string(),
        };
        Self::Torch(text.lines().next().unwrap_or_default().to_owned())
    }
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::Value { .. } => PyValueError::new_err(text),
            Error::Type { .. } => PyTypeError::new_err(text),
            Error::Arithmetic { .. } => PyArithmeticError::new_err(text),
            Error::Torch(_) => PyRuntimeError::new_err(text),
        }
    }
}
