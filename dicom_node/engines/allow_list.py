"""What of a source image's header may leave the node without identification: the allow-list, as data.

Everything not named here stays. What is named leaves only as a number, as a word of a vocabulary in this file, as a
code of the Standard's own context groups, as a registered UID, or as a UID of the job: no other text ever leaves.
The floor is the Basic Application Level Confidentiality Profile (PS3.15 E.1, table E.1-1): no attribute it removes,
empties or replaces is kept; beyond it, everything that is neither geometry, pixel description nor acquisition physics
goes too. Knows no files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = [
    "CODES",
    "EMPTIED",
    "EMPTIED_IF_THERE",
    "IMAGE_CLASSES",
    "JOB_UIDS",
    "NUMBERS",
    "ORDINALS",
    "POINTERS",
    "PRONE_TO_TEXT",
    "SEQUENCES",
    "SLIDE_CLASS",
    "TABLES",
    "TERMS",
]

SLIDE_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"
_SC = "1.2.840.10008.5.1.4.1.1.7"
# Classes whose images have text in the picture more often than not: only with Burned In Annotation NO
PRONE_TO_TEXT: Mapping[str, str] = {
    **dict.fromkeys((_SC, *(f"{_SC}.{number}" for number in (1, 2, 3, 4))), "a secondary capture"),
    **dict.fromkeys(
        (f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("3", "3.1", "6", "6.1", "6.2", "6.3")), "ultrasound"
    ),
}
# Image storage classes that this list was made for; of any other too little is known (PS3.4 table B.5-1)
IMAGE_CLASSES: frozenset[str] = frozenset(
    {
        *PRONE_TO_TEXT,
        SLIDE_CLASS,
        *(
            f"1.2.840.10008.5.1.4.1.1.{number}"
            for number in (
                *("1", "1.1", "1.1.1", "1.2", "1.2.1", "1.3", "1.3.1"),  # CR, DX, mammography, intra-oral
                *("2", "2.1", "2.2"),  # CT, enhanced and legacy converted
                *("4", "4.1", "4.3", "4.4"),  # MR, enhanced, colour, legacy converted
                *("20", "128", "130", "128.1"),  # NM, PET, enhanced and legacy converted
                *("12.1", "12.1.1", "12.2", "12.2.1"),  # XA, XRF
                *("13.1.1", "13.1.2", "13.1.3"),  # X-ray 3D angiographic, craniofacial, breast tomosynthesis
            )
        ),
    }
)

# UI: replaced by UIDs of the job
JOB_UIDS: frozenset[str] = frozenset(
    {
        *("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
        *("SynchronizationFrameOfReferenceUID", "ConcatenationUID", "SOPInstanceUIDOfConcatenationSource"),
        *("DimensionOrganizationUID", "PyramidUID"),
    }
)

# DS, IS, US, SS, UL, SL, FL, FD
NUMBERS: frozenset[str] = frozenset(
    {
        # pixel description (PS3.3 C.7.6.3, C.7.5.1.1.2) and what the values mean (C.11.1, C.11.2)
        *("SamplesPerPixel", "PlanarConfiguration", "Rows", "Columns", "NumberOfFrames", "BitsAllocated", "BitsStored"),
        *("HighBit", "PixelRepresentation", "SmallestImagePixelValue", "LargestImagePixelValue", "PixelPaddingValue"),
        *("PixelPaddingRangeLimit", "PixelAspectRatio", "LossyImageCompressionRatio", "LUTDescriptor"),
        *(f"{colour}PaletteColorLookupTableDescriptor" for colour in ("Red", "Green", "Blue")),
        *("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"),
        # geometry (C.7.6.2, C.7.6.16.2, C.10.7)
        *("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "SpacingBetweenSlices", "SliceThickness"),
        *(
            "ImagePositionPatient",
            "ImageOrientationPatient",
            "SliceLocation",
            "EstimatedRadiographicMagnificationFactor",
        ),
        *("DistanceSourceToDetector", "DistanceSourceToPatient", "DetectorElementSpacing", "FieldOfViewOrigin"),
        *("FieldOfViewRotation", "FieldOfViewDimensions", "PositionerPrimaryAngle", "PositionerSecondaryAngle"),
        # order and time within the acquisition
        *("SeriesNumber", "InstanceNumber", "AcquisitionNumber", "ImagesInAcquisition", "TemporalPositionIdentifier"),
        *("NumberOfTemporalPositions", "TemporalPositionIndex", "FrameAcquisitionNumber", "InStackPositionNumber"),
        *("DimensionIndexValues", "FrameAcquisitionDuration", "FrameTime", "FrameTimeVector", "TriggerTime"),
        *("TemporalPositionTimeOffset", "NominalPercentageOfCardiacPhase", "NominalPercentageOfRespiratoryPhase"),
        *("NominalCardiacTriggerDelayTime", "InConcatenationNumber", "InConcatenationTotalNumber"),
        *("ConcatenationFrameOffsetNumber", "NumberOfSlices", "NumberOfTimeSlices", "ImageIndex"),
        *("NumberOfEnergyWindows", "EnergyWindowVector", "NumberOfDetectors", "DetectorVector", "SliceVector"),
        # X-ray and CT physics (C.8.2.1, C.8.7, C.8.11, C.8.15.3)
        *("KVP", "XRayTubeCurrent", "XRayTubeCurrentInmA", "Exposure", "ExposureTime", "ExposureInuAs"),
        *("ExposureTimeInms", "ExposureInmAs", "GantryDetectorTilt", "TableHeight", "DataCollectionDiameter"),
        *("ReconstructionDiameter", "FocalSpots", "GeneratorPower", "SingleCollimationWidth", "TotalCollimationWidth"),
        *(
            "TableSpeed",
            "TableFeedPerRotation",
            "SpiralPitchFactor",
            "RevolutionTime",
            "CTDIvol",
            "ReconstructionAngle",
        ),
        *("ReconstructionTargetCenterPatient", "DataCollectionCenterPatient", "ReconstructionFieldOfView"),
        *("ReconstructionPixelSpacing", "Sensitivity", "RelativeXRayExposure", "ExposureIndex", "TargetExposureIndex"),
        "DeviationIndex",
        # MR physics (C.8.3.1, C.8.13.5)
        *("MagneticFieldStrength", "RepetitionTime", "EchoTime", "EchoNumbers", "EffectiveEchoTime", "InversionTime"),
        *("InversionTimes", "FlipAngle", "EchoTrainLength", "RFEchoTrainLength", "GradientEchoTrainLength"),
        *("NumberOfAverages", "ImagingFrequency", "NumberOfPhaseEncodingSteps", "PercentSampling"),
        *("PercentPhaseFieldOfView", "PixelBandwidth", "AcquisitionMatrix", "DiffusionBValue"),
        *("DiffusionGradientOrientation", "MRAcquisitionFrequencyEncodingSteps"),
        # PET and NM physics (C.8.9); without weight and times no SUV can be computed from them
        *("DecayFactor", "DoseCalibrationFactor", "ScatterFractionFactor", "SliceSensitivityFactor"),
        *("RadionuclideTotalDose", "RadionuclideHalfLife", "RadionuclidePositronFraction", "ActualFrameDuration"),
        "FrameReferenceTime",
        # ultrasound regions (C.8.5.5)
        *("RegionSpatialFormat", "RegionDataType", "RegionFlags", "RegionLocationMinX0", "RegionLocationMinY0"),
        *("RegionLocationMaxX1", "RegionLocationMaxY1", "PhysicalUnitsXDirection", "PhysicalUnitsYDirection"),
        *("PhysicalDeltaX", "PhysicalDeltaY", "ReferencePixelX0", "ReferencePixelY0", "UltrasoundColorDataPresent"),
        # whole slides (C.8.12.4 to C.8.12.6)
        *("TotalPixelMatrixColumns", "TotalPixelMatrixRows", "TotalPixelMatrixFocalPlanes", "ImagedVolumeWidth"),
        *("ImagedVolumeHeight", "ImagedVolumeDepth", "ImageOrientationSlide", "NumberOfOpticalPaths"),
        *("ColumnPositionInTotalImagePixelMatrix", "RowPositionInTotalImagePixelMatrix", "ObjectiveLensPower"),
        *("XOffsetInSlideCoordinateSystem", "YOffsetInSlideCoordinateSystem", "ZOffsetInSlideCoordinateSystem"),
        *("ObjectiveLensNumericalAperture", "CondenserLensPower", "IlluminationWaveLength"),
        "DistanceBetweenFocalPlanes",
    }
)

# Text that counts: kept when it is a plain number of at most four digits
ORDINALS: frozenset[str] = frozenset({"StackID", "OpticalPathIdentifier"})

# AT: kept when it names a standard attribute
POINTERS: frozenset[str] = frozenset({"DimensionIndexPointer", "FunctionalGroupPointer", "FrameIncrementPointer"})

# Lookup tables, and what says how long they are
TABLES: Mapping[str, str] = {
    "LUTData": "LUTDescriptor",
    **{
        f"{colour}PaletteColorLookupTableData": f"{colour}PaletteColorLookupTableDescriptor"
        for colour in ("Red", "Green", "Blue")
    },
}

# SQ: their items are filtered by this same list
SEQUENCES: frozenset[str] = frozenset(
    {
        *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "FrameContentSequence"),
        *("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "FrameAnatomySequence"),
        *("PixelValueTransformationSequence", "FrameVOILUTSequence", "ModalityLUTSequence", "VOILUTSequence"),
        *("TemporalPositionSequence", "CardiacSynchronizationSequence", "RespiratorySynchronizationSequence"),
        *("DimensionOrganizationSequence", "DimensionIndexSequence", "CTImageFrameTypeSequence"),
        *("CTAcquisitionTypeSequence", "CTAcquisitionDetailsSequence", "CTTableDynamicsSequence"),
        *("CTGeometrySequence", "CTPositionSequence", "CTReconstructionSequence", "CTExposureSequence"),
        *("CTXRayDetailsSequence", "MRImageFrameTypeSequence", "MREchoSequence", "MRAveragesSequence"),
        *("MRTimingAndRelatedParametersSequence", "MRFOVGeometrySequence", "MRModifierSequence"),
        *("MRDiffusionSequence", "DiffusionGradientDirectionSequence", "PETFrameTypeSequence"),
        *("RadiopharmaceuticalInformationSequence", "SequenceOfUltrasoundRegions"),
        *("TotalPixelMatrixOriginSequence", "PlanePositionSlideSequence", "OpticalPathSequence"),
        *("OpticalPathIdentificationSequence", "WholeSlideMicroscopyImageFrameTypeSequence"),
        *("XRay3DFrameTypeSequence", "FramePixelDataPropertiesSequence"),
    }
)

# SQ of codes: an item is kept when the dictionary made from PS3.16 has its code, with the dictionary's meaning
CODES: frozenset[str] = frozenset(
    {
        *("AnatomicRegionSequence", "AnatomicRegionModifierSequence", "ViewCodeSequence", "ViewModifierCodeSequence"),
        *("IlluminationTypeCodeSequence", "IlluminationColorCodeSequence"),
    }
)


def _words(text: str, *phrases: str) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(word) for word in (*text.split(), *phrases)))


_YES_NO = _words("YES NO")
_SIDES = _words("L R U B")
# What images are called by scanners of several makers (PS3.3 C.7.6.1.1.2, C.8.16.1); vendors' own words become OTHER
_FRAME_TYPE = _words(
    """ORIGINAL DERIVED MIXED PRIMARY SECONDARY AXIAL LOCALIZER REFORMATTED MPR MIP MINIP MEAN SUM SUBTRACT SUBTRACTION
    ADD ADDITION AVERAGE NONE OTHER VOLUME RESAMPLED RESAMPLE SINGLE BIPLANE A B STEREO M_SE M_FFE M_IR M_PCA M_TSE
    M_GR M P R I M_NORM M_DIS2D M_DIS3D DIS2D DIS3D NORM ND FFE SE IR PCA DIFFUSION ADC FA TRACEW TRACE ISOTROPIC
    ANISOTROPIC DWI B0 FLAIR DIXON WATER FAT IN_PHASE OUT_PHASE OPP_PHASE PERFUSION PERFUSION_ASL CBF CBV MTT TTP TMAX
    PROJECTION MAXIMUM MINIMUM MULTIPLICATION DIVISION FILTERED MEDIAN MAXIMUM_IP MINIMUM_IP MEAN_IP ANGIO ANGIO_TIME
    CINE VELOCITY TAGGING T1 T2 T2_STAR PROTON_DENSITY DENSITY_MAP PHASE_MAP FIELD_MAP MASK STATIC DYNAMIC GATED
    EMISSION TRANSMISSION TOMO RECON GENERATED_2D TOMOSYNTHESIS CT_SOM5 CT_SOM7 SPI SEQ SPIRAL MOSAIC PFP FM MFSPLIT
    STD HELICAL ATTENUATION ENHANCED ERROR MONO_ENERGETIC""",
    *("WHOLE BODY", "PROJECTION IMAGE", "GATED TOMO", "RECON TOMO", "RECON GATED TOMO"),
)

_BODY_PARTS = _words(
    """ABDOMEN ABDOMENPELVIS ACJOINT ADRENAL ANKLE AORTA ARM AXILLA BACK BILEDUCT BLADDER BRAIN BREAST BRONCHUS BUTTOCK
    CALCANEUS CALF CAROTID CEREBELLUM CHEST CHESTABDOMEN CHESTABDPELVIS CIRCLEOFWILLIS CLAVICLE COCCYX COLON CORNEA
    CORONARYARTERY CSPINE CTSPINE DUODENUM EAR ELBOW ESOPHAGUS EXTREMITY EYE EYELID FACE FEMUR FIBULA FINGER FOOT
    FOREARM GALLBLADDER HAND HEAD HEADNECK HEART HIP HUMERUS IAC ILEUM ILIUM JAW JEJUNUM KIDNEY KNEE LARGEINTESTINE
    LARYNX LEG LIVER LSPINE LSSPINE LUNG MASTOID MAXILLA MEDIASTINUM MOUTH NECK NECKCHEST NECKCHESTABDOMEN
    NECKCHESTABDPELV NOSE OPTICCANAL ORBIT OVARY PANCREAS PANCREATICDUCT PARATHYROID PAROTID PATELLA PELVIS PENIS
    PHARYNX PROSTATE RECTUM RENALVEIN RIB SCALP SCAPULA SCJOINT SCROTUM SELLA SESAMOID SHOULDER SIJOINT SKULL
    SMALLINTESTINE SPINE SPLEEN SSPINE STERNUM STOMACH SUBMANDIBULAR TESTIS THIGH THORAX THUMB THYMUS THYROID TLSPINE
    TMJ TOE TRACHEA TSPINE UPRURINARYTRACT URETER URETHRA UTERUS VAGINA VULVA WHOLEBODY WRIST ZYGOMA"""
)

# CS, and LO that has defined terms: only these values leave, one by one
TERMS: Mapping[str, re.Pattern[str]] = {
    "Modality": _words("CR CT DX IO IVUS MG MR NM OT PT PX RF RG SM US XA"),
    "ImageType": _FRAME_TYPE,
    "FrameType": _FRAME_TYPE,
    "PhotometricInterpretation": re.compile(
        r"MONOCHROME[12]|RGB|PALETTE COLOR|YBR_(FULL|FULL_422|PARTIAL_422|PARTIAL_420|ICT|RCT)|XYB"
    ),
    "PixelPresentation": _words("MONOCHROME COLOR MIXED TRUE_COLOR"),
    "VolumetricProperties": _words("VOLUME SAMPLED DISTORTED MIXED"),
    "VolumeBasedCalculationTechnique": _words("MAX_IP MIN_IP VOLUME_RENDER SURFACE_RENDER MPR CURVED_MPR NONE MIXED"),
    "LossyImageCompression": _words("00 01"),
    "LossyImageCompressionMethod": _words("ISO_10918_1 ISO_14495_1 ISO_15444_1 ISO_15444_15 ISO_18181_1"),
    "BurnedInAnnotation": _words("NO"),
    "SpecimenLabelInImage": _words("NO"),
    "PresentationIntentType": re.compile("FOR PRESENTATION|FOR PROCESSING"),
    "PresentationLUTShape": _words("IDENTITY INVERSE"),
    "PixelIntensityRelationship": _words("LIN LOG OTHER DISP"),
    "RescaleType": _words("HU HU_MOD OD US MGML PCT Z_EFF ED EDW"),
    "ModalityLUTType": _words("HU HU_MOD OD US MGML PCT Z_EFF ED EDW"),
    "VOILUTFunction": _words("LINEAR LINEAR_EXACT SIGMOID"),
    "BodyPartExamined": _BODY_PARTS,
    "Laterality": _SIDES,
    "ImageLaterality": _SIDES,
    "FrameLaterality": _SIDES,
    "ViewPosition": _words(
        "AP PA LL RL RLD LLD RLO LLO LAO RAO LPO RPO LATERAL FRONTAL OBLIQUE ML MLO LM LMO CC FB SIO ISO XCCL XCCM"
    ),
    "PatientPosition": _words("HFP HFS HFDR HFDL FFP FFS FFDR FFDL LFP LFS RFP RFS AFDR AFDL PFDR PFDL"),
    "PatientOrientation": re.compile("[APLRHF]{1,3}"),
    "QualityControlImage": _YES_NO,
    # CT
    "AcquisitionType": _words("SEQUENCED SPIRAL CONSTANT_ANGLE STATIONARY FREE"),
    "RotationDirection": _words("CW CC"),
    "ReconstructionAlgorithm": _words("FILTER_BACK_PROJ ITERATIVE"),
    "ConvolutionKernelGroup": _words("BRAIN SOFT_TISSUE LUNG BONE CONSTANT_ANGLE"),
    # MR
    "ScanningSequence": _words("SE IR GR EP RM"),
    "SequenceVariant": _words("SK MTC SS TRSS SP MP OSP TOF NONE"),
    "MRAcquisitionType": _words("1D 2D 3D"),
    "AngioFlag": _words("Y N"),
    "InPlanePhaseEncodingDirection": _words("ROW COL COLUMN OTHER"),
    "EchoPulseSequence": _words("SPIN GRADIENT BOTH"),
    "ComplexImageComponent": _words("MAGNITUDE PHASE REAL IMAGINARY MIXED"),
    "AcquisitionContrast": _words(
        "DIFFUSION FLOW_ENCODED FLUID_ATTENUATED PERFUSION PROTON_DENSITY STIR TAGGING T1 T2 T2_STAR TOF UNKNOWN MIXED"
    ),
    "DiffusionDirectionality": _words("DIRECTIONAL BMATRIX ISOTROPIC NONE"),
    # PET
    "Units": _words("CNTS NONE CM2 CM2ML PCNT CPS BQML MGMINML UMOLMINML MLMING MLG 1CM UMOLML PROPCNTS PROPCPS GML"),
    "SUVType": _words("BSA BW LBM LBMJAMES128 LBMJANMA IBW"),
    "CountsSource": _words("EMISSION TRANSMISSION"),
    "SeriesType": re.compile("STATIC|DYNAMIC|GATED|WHOLE BODY|IMAGE|REPROJECTION"),
    "DecayCorrection": _words("NONE START ADMIN"),
    "CorrectedImage": _words("DECY ATTN SCAT DTIM MOTN PMOT CLN RAN RADL DCAL NORM"),
    # frames and slides
    "DimensionOrganizationType": _words("3D 3D_TEMPORAL TILED_FULL TILED_SPARSE"),
    "FocusMethod": _words("AUTO MANUAL"),
    "ExtendedDepthOfField": _YES_NO,
}

# Present in every image and empty, so that it stays one that others can read (PS3.3, type 2)
EMPTIED: tuple[str, ...] = (
    *("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID"),
    *("PatientBirthDate", "PatientSex", "Manufacturer"),
)
# ... and where the source has them
EMPTIED_IF_THERE: tuple[str, ...] = (
    *("PositionReferenceIndicator", "ContentDate", "ContentTime", "ScanOptions", "ContrastBolusAgent"),
)
